"""Which model filled a cache: what a session's file says of it, and whether another model may use that file."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from sa_convert.families.family import PREFIX

SAMPLES = 1024
"""Numbers of each tensor that are hashed, evenly spaced. To read all would take longer than the caches save."""

_NOT_OF_THE_CACHE = frozenset(
    {
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id",
        "model_type", "pad_token_id", "shared_attention", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Keys of a config that change no number in a cache, or that are compared apart from the others."""


@dataclass(frozen=True)
class ModelIdentity:
    """What a cache depends on. A folder that is moved or renamed keeps its identity."""

    model: str
    """SHA-256 of the config and of samples of every tensor."""

    plan: str
    """SHA-256 of what is done to every KV group; "base" if nothing is."""

    dtype: str
    """Of the computation, such as "float32"."""

    revision: str
    """The commit on the Hub, or "". It is told and not compared: what it changes in the weights shows in `model`."""

    def differs_from(self, other: "ModelIdentity") -> str | None:
        """In which way, for a sentence, or None."""
        if self.dtype != other.dtype:
            return f"a model in {other.dtype}, and this one computes in {self.dtype}"
        if self.plan != other.plan:
            return f"{_planned(other)}, and this one is {_planned(self)}"
        return "another model, or one with other weights" if self.model != other.model else None


def identity_of(model: Any) -> ModelIdentity:
    """Of a model that is loaded. It takes some milliseconds; weights on the `meta` device (offloaded to a disk) count
    by their names and shapes alone."""
    config = model.config.get_text_config(decoder=True)
    shared = getattr(model.config, "shared_attention", None) or getattr(config, "shared_attention", None)
    plan = "base" if not shared else _hash(json.dumps(shared.get("layers"), sort_keys=True, default=str).encode())
    return ModelIdentity(
        model=_model_hash(model, config.to_dict()),
        plan=plan,
        dtype=str(model.dtype).removeprefix("torch."),
        revision=str(getattr(model.config, "_commit_hash", None) or ""),
    )


def _planned(identity: ModelIdentity) -> str:
    return "a base model" if identity.plan == "base" else f"one converted by plan {identity.plan[:8]}"


def _model_hash(model: Any, config: dict[str, Any]) -> str:
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_CACHE and "_attn_impl" not in key}
    kept["model_type"] = str(config.get("model_type")).removeprefix(PREFIX)
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(_samples(tensor))
    return digest.hexdigest()


def _samples(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    count = min(tensor.numel(), SAMPLES)
    places = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long().to(tensor.device)
    chosen = tensor.detach().flatten()[places].cpu()
    return chosen.view(torch.uint8).numpy().tobytes()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
