"""Which family a model belongs to: chosen by its config, never by its name."""

from collections.abc import Iterable, Mapping
from typing import Any

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.export.shared_attention_families import FAMILIES, PREFIX, Family, auto_class_of
from sa_convert.read.refusals import reason_for


def family_of(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> Family:
    """The family of a model.

    config: its config.json. tensors: the names of its tensors, if they are known; they only serve to explain a refusal.
    Raises CheckpointError where config.json names no model type, UnsupportedModelError where we cannot convert it.
    """
    model_type = config.get("model_type")
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


def architecture_of(config: Mapping[str, Any], family: Family) -> str:
    """The model class that config.json names. Raises UnsupportedModelError where it is no class of the family,
    CheckpointError where it is no list."""
    named = config.get("architectures") or [family.default_class]
    if not isinstance(named, list):
        raise CheckpointError(f"config.json: 'architectures' should be a list of class names, but is {named!r}.")
    found = next((name for name in map(str, named) if auto_class_of(family, name)), None)
    if found is None:
        raise UnsupportedModelError(
            f"config.json names the architecture {', '.join(map(str, named))}, which is none that sa-convert knows for "
            f"models of type '{family.model_type}' ({family.default_class} is one)."
        )
    return found
