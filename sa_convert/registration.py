"""Makes transformers know the shared-attention types once sa_convert is imported, without importing transformers here.

`import sa_convert` must stay light (`sa-convert --help`, header-only work), so where transformers is not loaded yet,
the types are registered right after it is. Registration is transformers' own: AutoConfig.register
and the auto classes' register.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, new_class
from typing import Any

from sa_convert.read.auto_classes import model_classes_of
from sa_convert.runtime.shared_attention_families import CLASS_PREFIX, FAMILIES, auto_class_of


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
        from sa_convert.runtime.modeling_shared_attention import model_class_of

        family, architecture = cls.__dict__["_family"], cls.__dict__["_architecture"]
        model_class: Any = model_class_of(family, architecture)
        # So that save_pretrained writes the code files beside the weights, as it does for remote code.
        model_class.register_for_auto_class(auto_class_of(family, architecture))
        return model_class

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

    from sa_convert.runtime.configuration_shared_attention import config_class_of

    known = set(dir(transformers))
    for family in FAMILIES.values():
        if family.config_class not in known:
            continue
        config_class: Any = config_class_of(family)
        config_class.register_for_auto_class()
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, architecture in model_classes_of(family, family.default_class).items():
            if architecture not in known or auto_class not in known:
                continue
            members = {"config_class": config_class, "_family": family, "_architecture": architecture}
            stand_in = _StandIn(CLASS_PREFIX + architecture, (), members)
            getattr(transformers, auto_class).register(config_class, stand_in, exist_ok=True)


class _RegisterAfterLoading(importlib.abc.MetaPathFinder):
    """Finds transformers as Python does, and registers our classes when it has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        cancel()
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_when_loaded() -> None:
    """Register now if transformers is loaded, else as soon as it is."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterLoading())


def cancel() -> None:
    """Do not register. The command line validates a checkpoint by the code inside of its folder, not by ours."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RegisterAfterLoading)]
