"""What `sa-convert inspect` does: says what a model is and what can be done to it, from config.json and headers."""

from collections.abc import Mapping
from typing import Any

from sa_convert.console.progress import notes
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.inspection import Inspection
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.errors import UnsupportedModelError
from sa_convert.families.family import PREFIX
from sa_convert.plan.converted import converted_parts
from sa_convert.plan.savings import bytes_per_token, cache_at, contexts
from sa_convert.read.family_of import family_of
from sa_convert.read.geometry_of import geometry_of
from sa_convert.read.open_model import open_model
from sa_convert.treatments.registry import treatments


def inspect(reference: str) -> Inspection:
    """Describe the model that the user calls `reference`. Raises CheckpointError, UnsupportedModelError."""
    # 1. Headers; what is to be said of them is told on stderr.
    checkpoint = open_model(reference)
    notes(checkpoint.identity, checkpoint.notes)
    # 2. What they mean.
    return inspect_checkpoint(checkpoint)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Everything that config.json and the headers tell; a model that cannot be converted is still described.

    Raises CheckpointError if the files contradict each other.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    family = geometry = reason = plan = None
    cache, caches = None, None
    try:
        if str(config.get("model_type")).startswith(PREFIX) and isinstance(config.get("shared_attention"), Mapping):
            model, plan = converted_parts(checkpoint)
            family, geometry = model.family, model.geometry
            cache, caches = bytes_per_token(model, plan), _caches(model, plan)
            reason = "The model shares attention already; convert its base model with another recipe."
        else:
            family = family_of(config, tensors)
            geometry = geometry_of(checkpoint, family)
            model = Model(checkpoint=checkpoint, family=family, geometry=geometry)
            cache, caches = bytes_per_token(model, Plan()), _caches(model, Plan())
    except UnsupportedModelError as error:
        reason = str(error)
    told = tuple(treatment.inspected(geometry, plan, reason) for treatment in treatments())
    if reason is None and all(inspected.reason for inspected in told):
        reason = told[0].reason
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.elements
    first = next(layer for layer in geometry.layers if layer.heads) if geometry else None
    return Inspection(
        model=checkpoint.identity,
        revision=checkpoint.revision,
        model_type=str(config.get("model_type")),
        family=family.model_type if family else None,
        reason=reason,
        layers=len(geometry.layers) if geometry else _told(config, "num_hidden_layers", "n_layer", "num_layers"),
        query_heads=first.heads if first else _told(config, "num_attention_heads", "n_head", "num_heads"),
        kv_groups=first.groups if first else _told(config, "num_key_value_heads", "num_kv_heads"),
        head_dim=first.head_dim if first else _told(config, "head_dim"),
        geometry=geometry,
        treatments=told,
        tensors=len(tensors),
        shards=len(checkpoint.shards),
        parameters=sum(dtypes.values()),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        checkpoint_bytes=sum(tensor.bytes for tensor in tensors.values()),
        cache_bytes_per_token=cache,
        cache_bytes=caches or None,
    )


def _caches(model: Model, plan: Plan) -> dict[int, int]:
    """Bytes of the cache by tokens; empty for a model that caches nothing."""
    sizes = {tokens: cache_at(model, plan, tokens) for tokens in contexts(model)}
    return sizes if any(sizes.values()) else {}


def _told(config: Mapping[str, Any], *keys: str) -> int | None:
    """What config.json says under the first of these keys that it has, also for the text part of a multimodal model."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in keys:
            if isinstance(place.get(key), int):
                return int(place[key])
    return None
