"""A model that shares attention already: what its base was like, and what it shares."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sa_convert.data.checkpoint import Checkpoint
from sa_convert.data.geometry import LayerGeometry, ModelGeometry
from sa_convert.data.sharing_map import SharingMap
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.export.shared_attention_families import FAMILIES, PREFIX, Family
from sa_convert.plan.rules import check_map
from sa_convert.read.geometry import DEPTHS, attention_kinds, caches, layer_geometry, number
from sa_convert.read.names import attention_config, has_stack


def converted_parts(checkpoint: Checkpoint) -> tuple[Family, ModelGeometry, SharingMap]:
    """Family, geometry of the base, and map of a converted model; the keys that it lost are not in its files.

    Raises UnsupportedModelError for an unknown base type, CheckpointError or SharingError for wrong files.
    """
    config = checkpoint.config
    base = str(config["model_type"]).removeprefix(PREFIX)
    family = FAMILIES.get(base)
    if family is None:
        raise UnsupportedModelError(
            f"The model has type '{config['model_type']}', whose base '{base}' this version does not know."
        )
    rows: Any = config["shared_attention"].get("layers")
    geometry = _geometry(checkpoint, family, rows if isinstance(rows, Mapping) else {})
    try:
        shared = SharingMap.from_json(rows, geometry.stacks)
    except (AttributeError, TypeError, ValueError, IndexError):
        raise CheckpointError(
            "config.json: 'shared_attention' does not list sources for the heads of layers."
        ) from None
    check_map(shared, geometry)
    return family, geometry, shared


def _geometry(checkpoint: Checkpoint, family: Family, rows: Mapping[str, Any]) -> ModelGeometry:
    """The base's. The first layer of each stack owns all its attention, and tells the head size and the groups."""
    config = attention_config(checkpoint.config, family)
    layers: list[LayerGeometry] = []
    for stack in family.all_stacks:
        if family.encoder_decoder and not has_stack(checkpoint, family, stack):
            continue
        depth, cached = number(config, stack.depth, *DEPTHS), caches(config, family, stack)
        own = [f"{stack.name}.{at}".removeprefix(".") not in rows for at in range(depth)]
        found = [
            layer_geometry(checkpoint, config, family, stack, at, depth) if own[at] else None for at in range(depth)
        ]
        whole = next((layer for layer in found if layer), None)
        if whole is None:
            raise CheckpointError("config.json: 'shared_attention' lets every layer reuse another, which none can own.")
        for at, (kind, window, rotary) in enumerate(attention_kinds(config, family, depth)):
            layer = found[at] or (LayerGeometry(0, 0, 0) if own[at] else whole)
            kind = kind if layer.heads else "none"
            layers.append(replace(layer, attention=kind, window=window, rotary=rotary, stack=stack.name, cached=cached))
    return ModelGeometry(tuple(layers), family.granularity)
