"""Which family a model belongs to: chosen by its config, never by its name."""

from collections.abc import Iterable, Mapping
from typing import Any

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.export.shared_attention_families import FAMILIES, PREFIX, Family, auto_class_of

# What the tensors of a model outside of our families say about the reason, by a part of their names.
_REASONS = (
    (
        ("kv_a_proj", "kv_b_proj", "q_a_proj"),
        "it has latent attention (MLA), whose keys are not one projection per head",
    ),
    (("mamba", "A_log", "x_proj", "ssm"), "it has state-space layers, which have no attention weights to share"),
    (
        ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv.weight", "in_proj_weight"),
        "its query, key and value projections are fused in one tensor, which this version cannot take apart",
    ),
    (("encoder.",), "it has an encoder; this version converts decoder-only language models"),
)


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
            f"Models of type '{model_type}' are not supported: {_reason(config, list(tensors))}. "
            f"Supported types: {', '.join(sorted(FAMILIES))}."
        )
    architecture_of(config, family)
    return family


def architecture_of(config: Mapping[str, Any], family: Family) -> str:
    """The model class that config.json names. Raises UnsupportedModelError where it is no class of the family."""
    named = config.get("architectures") or [family.default_class]
    found = next((name for name in map(str, named) if auto_class_of(family, name)), None)
    if found is None:
        raise UnsupportedModelError(
            f"config.json names the architecture {', '.join(map(str, named))}, which is none that sa-convert knows for "
            f"models of type '{family.model_type}' ({family.default_class} is one)."
        )
    return found


def _reason(config: Mapping[str, Any], tensors: list[str]) -> str:
    if "auto_map" in config:
        return "its modeling code is not part of transformers, so what it computes is not known"
    if isinstance(config.get("text_config"), Mapping):
        return "it is a multimodal model; this version does not convert the language model inside of one"
    for parts, reason in _REASONS:
        found = next((name for name in tensors if any(part in name for part in parts)), None)
        if found is not None:
            return f"{reason} ('{found}')"
    return "there is no entry for its attention in shared_attention_families"
