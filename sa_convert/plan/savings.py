"""What a sharing map removes, computed from headers and the map."""

from collections.abc import Mapping

from sa_convert.data.checkpoint import DTYPE_BITS, Checkpoint, TensorEdit
from sa_convert.data.geometry import ModelGeometry
from sa_convert.data.report import Change, Savings
from sa_convert.data.sharing_map import SharingMap
from sa_convert.export.shared_attention_families import Family
from sa_convert.read.geometry import attention_prefix


def plan_savings(
    checkpoint: Checkpoint,
    family: Family,
    geometry: ModelGeometry,
    sharing: SharingMap,
    edits: Mapping[str, TensorEdit],
) -> Savings:
    """Parameters, bytes of the tensors, and cache bytes per token of one sequence, before and after."""
    parameters = removed = size = removed_size = 0
    for tensor in checkpoint.tensors.values():
        parameters += tensor.elements
        size += tensor.bytes
        edit = edits.get(tensor.name)
        if edit is not None and tensor.shape and edit.rows is not None:
            rows = tensor.shape[0] - edit.shape(tensor)[0]
            removed += tensor.elements // tensor.shape[0] * rows
            removed_size += tensor.bytes // tensor.shape[0] * rows
    before, after = (
        cache_bytes(checkpoint, family, geometry, SharingMap()),
        cache_bytes(checkpoint, family, geometry, sharing),
    )
    keys = sum(layer.groups * layer.head_dim for layer in geometry.layers)
    kept = sum(len(sharing.own_groups(index, layer)) * layer.head_dim for index, layer in enumerate(geometry.layers))
    return Savings(
        parameters=Change(parameters, parameters - removed),
        checkpoint_bytes=Change(size, size - removed_size),
        cache_bytes_per_token=Change(before, after),
        key_cache_removed=1 - kept / keys,
    )


def cache_bytes(checkpoint: Checkpoint, family: Family, geometry: ModelGeometry, sharing: SharingMap) -> int:
    """Bytes that one token of one sequence adds to the KV cache, in the dtype of the key projections."""
    tensors, total = checkpoint.tensors, 0
    for index, layer in enumerate(geometry.layers):
        prefix = attention_prefix(checkpoint, family, index)
        width = DTYPE_BITS[tensors[f"{prefix}{family.key}.weight"].dtype] // 8
        keys = len(sharing.own_groups(index, layer)) * layer.head_dim
        values = tensors[f"{prefix}{family.value}.weight"].shape[0]
        total += (keys + values) * width
    return total
