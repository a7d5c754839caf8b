"""A model that shares attention already: what its base was like, and what it shares."""

from typing import Any

from sa_convert.data.checkpoint import DTYPE_BITS, Checkpoint, TensorEntry
from sa_convert.data.geometry import LayerGeometry, ModelGeometry
from sa_convert.data.sharing_map import SharingMap
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.export.shared_attention_families import FAMILIES, PREFIX, Family
from sa_convert.plan.rules import check_map
from sa_convert.read.geometry import attention_kinds, attention_prefix, number


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
    heads = number(config, "num_attention_heads")
    groups = heads if config.get("num_key_value_heads") is None else number(config, "num_key_value_heads")
    layers = []
    for index, kind in enumerate(attention_kinds(config, family, number(config, "num_hidden_layers"))):
        values = _values(checkpoint, family, index)
        layers.append(LayerGeometry(heads, groups, values.shape[0] // groups, *kind))
    rows: Any = config["shared_attention"].get("layers")
    try:
        shared = SharingMap.from_json(rows)
    except (AttributeError, TypeError, ValueError, IndexError):
        raise CheckpointError(
            "config.json: 'shared_attention' does not list sources for the heads of layers."
        ) from None
    geometry = ModelGeometry(tuple(layers), family.granularity)
    check_map(shared, geometry)
    return family, geometry, shared


def _values(checkpoint: Checkpoint, family: Family, layer: int) -> TensorEntry:
    name = f"{attention_prefix(checkpoint, family, layer)}{family.value}.weight"
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"The checkpoint has no tensor '{name}', though config.json counts that layer.")
    return tensor


def converted_cache_bytes(checkpoint: Checkpoint, family: Family, geometry: ModelGeometry, shared: SharingMap) -> int:
    """Cache bytes per token of a converted model; its reusing layers have no key projection that tells the dtype."""
    total = 0
    for index, layer in enumerate(geometry.layers):
        values = _values(checkpoint, family, index)
        keys = len(shared.own_groups(index, layer)) * layer.head_dim
        total += (keys + values.shape[0]) * DTYPE_BITS[values.dtype] // 8
    return total
