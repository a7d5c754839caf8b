"""Why models of types without an entry among the families are refused.

What tensors cannot tell stands in refused.json: a reason, and the types of which it is true.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

NO_ENTRY = "there is no entry for its attention among the families of sa-convert"
"""What is said of a type of which nothing else is known."""

_LATENT = ("kv_a_proj", "kv_b_proj", "q_a_proj")
_RECURRENT = ("mamba", "A_log", "ssm")
_QUERIES = ("q_proj", "query", "q_lin", "c_attn", "qkv", "Wqkv")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj_weight")
# Parts of a model that have fused tensors, too, but are no attention of a language model.
_ELSEWHERE = ("vision", "visual", "image", "audio", "linear_attn", "conv", "mamba")


def reason_for(config: Mapping[str, Any], tensors: list[str]) -> str:
    """Why a model without an entry is refused. tensors: the names of its tensors, as far as they are known."""
    if "auto_map" in config:
        return "its modeling code is not part of transformers, so what it computes is not known"
    known = refused_types().get(str(config.get("model_type")))
    return known or _latent(tensors) or _by_config(config) or _recurrent(tensors) or _fused(tensors) or NO_ENTRY


@cache
def refused_types() -> Mapping[str, str]:
    """Why a type is refused, by model type."""
    reasons = json.loads(Path(__file__).with_name("refused.json").read_text(encoding="utf-8"))
    return {model_type: reason for reason, types in reasons.items() for model_type in types}


def _latent(tensors: list[str]) -> str | None:
    found = next((name for name in tensors if any(part in name for part in _LATENT)), None)
    return found and f"it has latent attention (MLA), whose keys are not one projection per head ('{found}')"


def _by_config(config: Mapping[str, Any]) -> str | None:
    if any(isinstance(config.get(key), Mapping) for key in ("text_config", "vision_config", "audio_config")):
        return "it is a multimodal model, and there is no entry for the language model inside of this one"
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder of a make that has no entry"
    return None


def _recurrent(tensors: list[str]) -> str | None:
    found = next((name for name in tensors if any(part in name for part in _RECURRENT)), None)
    if found is None:
        return None
    if any(_has(name, _QUERIES) for name in tensors):
        return f"it has hybrid layers (attention and state-space) of a make that has no entry ('{found}')"
    return f"it has recurrent (state-space) layers only, and so no attention probabilities to share ('{found}')"


def _fused(tensors: list[str]) -> str | None:
    language = (name for name in tensors if not any(part in name for part in _ELSEWHERE))
    found = next((name for name in language if _has(name, _FUSED)), None)
    return found and f"its queries, keys and values are fused in one tensor of a layout that is not known ('{found}')"


def _has(name: str, parts: tuple[str, ...]) -> bool:
    """Whether one of the modules in a tensor's name is called so: 'hc_attn_base' is no 'c_attn'."""
    return any(part in parts for part in name.split("."))
