"""The classes of converted models in this process, made when they are asked for; a checkpoint's own code names them
literally. `register` hands them to transformers.
"""

from functools import cache
from importlib import import_module
from pathlib import Path
from types import new_class
from typing import Any

from sa_convert.families.family import CLASS_PREFIX, PREFIX, Family
from sa_convert.families.model_classes import auto_class_of, model_classes_of
from sa_convert.families.table import FAMILIES
from sa_convert.models.attention_class import attention_class_of
from sa_convert.plan.audited import expected_code
from sa_convert.plan.converted import upgraded
from sa_convert.rewrite.carried import auto_map, class_name
from sa_convert.treatments.registry import treatments


@cache
def config_class_of(family: Family) -> type:
    """The configuration class of a family: its base's, with our model type."""
    import transformers

    from sa_convert.runtime.configuration_shared_attention import TreatedConfig

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and with the code, for the model may be loaded elsewhere. A model saves its config so."""
        architecture = (getattr(self, "architectures", None) or [family.default_class])[0].removeprefix(CLASS_PREFIX)
        classes = model_classes_of(family, architecture)
        self.auto_map = auto_map(family, classes)
        if hasattr(self, "shared_attention"):
            self.shared_attention = upgraded(self.to_dict(), family)["shared_attention"]
        super(made, self).save_pretrained(save_directory, *args, **kwargs)
        for name, content in expected_code(self.to_dict()).items():
            (Path(save_directory) / name).write_bytes(content)

    base: Any = getattr(transformers, family.config_class)
    members = {
        "model_type": PREFIX + family.model_type,
        "needs_5": family.transformers_5,
        "save_pretrained": save_pretrained,
        "__module__": __name__,
    }
    made: Any = type(CLASS_PREFIX + family.config_class, (TreatedConfig, base), members)
    return made


@cache
def model_class_of(family: Family, architecture: str) -> type:
    """The model class of a family for one of its base's classes, such as LlamaForCausalLM, treated as its config says.

    Unlike the classes in a checkpoint it also takes configs of version 1.
    """
    from sa_convert.runtime import modeling_shared_attention as modeling

    def described(config: Any) -> Any:
        return upgraded(config.to_dict(), family)["shared_attention"]

    members = {
        "config_class": config_class_of(family),
        "treatments": _treatment_classes(),
        "attention_class": attention_class_of(family.modules),
        "described": staticmethod(described),
        "__module__": __name__,
    }
    return type(CLASS_PREFIX + architecture, (modeling.TreatedModel, modeling.base_class(architecture)), members)


def _treatment_classes() -> dict[str, type]:
    """The runtime class of each treatment, which carried code names literally."""
    found = {}
    for treatment in treatments():
        runtime = import_module(f"{type(treatment).__module__.rpartition('.')[0]}.runtime")
        found[treatment.name] = getattr(runtime, class_name(treatment.name))
    return found


def __getattr__(name: str) -> Any:
    """These classes by name, as pickle looks for them in another process."""
    base = name.removeprefix(CLASS_PREFIX)
    for family in FAMILIES.values() if base != name else ():
        if base == family.config_class:
            return config_class_of(family)
        if auto_class_of(family, base):
            return model_class_of(family, base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _StandIn(type):
    """The type of a class that stands for a model class and makes it when it is used, so that registration does not
    import every model: it is called, asked for attributes, derived from and tested against in that one's place."""

    def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(cls, name, bases, members)
        # A class that derives from stand-ins derives from what they stand for.
        real = tuple(base.real_class() if isinstance(base, _StandIn) else base for base in bases)
        return new_class(name, real, exec_body=lambda namespace: namespace.update(members))

    def real_class(cls) -> Any:
        family, architecture = cls.__dict__["_family"], cls.__dict__["_architecture"]
        return model_class_of(family, architecture)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real_class(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.real_class()(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.real_class())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or issubclass(subclass, cls.real_class())


def register() -> None:
    """Register every family that this transformers has with AutoConfig, and its classes with their auto classes."""
    import transformers

    known = set(dir(transformers))
    for family in FAMILIES.values():
        if family.config_class not in known:
            continue
        config_class: Any = config_class_of(family)
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, architecture in model_classes_of(family, family.default_class).items():
            if architecture not in known or auto_class not in known:
                continue
            members = {"config_class": config_class, "_family": family, "_architecture": architecture}
            stand_in = _StandIn(CLASS_PREFIX + architecture, (), members)
            getattr(transformers, auto_class).register(config_class, stand_in, exist_ok=True)
