"""Which family a model belongs to: chosen by its config, never by its name."""

from collections.abc import Iterable, Mapping
from typing import Any

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.families.family import PREFIX, Family
from sa_convert.families.model_classes import auto_class_of, ending_of
from sa_convert.families.refusals import reason_for
from sa_convert.families.table import FAMILIES

_WRAPPERS = (
    "OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "DeepSpeedEngine",
    "PipelineEngine",
)  # fmt: skip
"""What transformers writes under `architectures` if it is asked to save a model from outside of such a wrapper."""

_FSDP = "FSDP"
"""What fully_shard of PyTorch puts before the name of a model class."""


def family_of(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> Family:
    """The family of a model.

    config: its config.json. tensors: the names of its tensors, if they are known; they only serve to explain a refusal.
    Raises CheckpointError if config.json names no model type, UnsupportedModelError if we cannot convert it.
    """
    model_type = type_of(config)
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError("config.json has no 'model_type'; give a folder that transformers can load.")
    if model_type.startswith(PREFIX):
        raise UnsupportedModelError(
            f"The model (type '{model_type}') shares attention already; convert its base model with another recipe."
        )
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"Models of type '{model_type}' are not supported: {reason_for(config, list(tensors))}. "
            f"Supported types: {', '.join(sorted(FAMILIES))}."
        )
    if family.refuses is not None:
        key, value, reason = family.refuses
        if config.get(key) == value:
            raise UnsupportedModelError(
                f"config.json: '{key}' is {value!r}, with which it cannot be converted: {reason}."
            )
    architecture_of(config, family)
    return family


def type_of(config: Mapping[str, Any]) -> Any:
    """The model type that transformers goes by: it takes a Mistral that lists its layers' types for a Ministral."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    key, other = family.taken_for if family is not None and family.taken_for else (None, None)
    return other if key in config else model_type


def architecture_of(config: Mapping[str, Any], family: Family) -> str:
    """The model class that config.json names, or that of a model of this family if it names a wrapper around one.

    Raises UnsupportedModelError if it is no class of the family, CheckpointError if it is no list.
    """
    named = config.get("architectures") or [family.default_class]
    if not isinstance(named, list):
        raise CheckpointError(f"config.json: 'architectures' should be a list of class names, but is {named!r}.")
    names = [unwrapped(str(name), family) for name in named]
    found = next((name for name in names if auto_class_of(family, name)), None)
    if found is None:
        raise UnsupportedModelError(
            f"config.json names the architecture {', '.join(map(str, named))}, which is none that sa-convert knows for "
            f"models of type '{family.model_type}' ({family.default_class} is one)."
        )
    return found


def unwrapped(name: str, family: Family) -> str:
    """The model class of the family that a name under `architectures` stands for, or the name itself.

    transformers goes by the auto class that it is asked for, and never reads that name: models are saved from inside of
    wrappers, or keep the name of the model that they were made from.
    """
    name = name.removeprefix(_FSDP)
    usual = ending_of(family.default_class) or family.default_class
    if name in _WRAPPERS or (auto_class_of(family, name) is None and name.endswith(usual)):
        return family.default_class
    return name
