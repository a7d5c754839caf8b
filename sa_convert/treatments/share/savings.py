"""What a sharing map removes, computed from headers and the map."""

from collections.abc import Mapping
from math import prod

from sa_convert.domain.checkpoint import DTYPE_BITS, Checkpoint, TensorEdit
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.report import Change, Savings
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.families.family import Family
from sa_convert.read.names import attention_prefix, projection


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
        if edit is not None:
            gone = tensor.elements - prod(edit.shape(tensor))
            removed += gone
            removed_size += gone * DTYPE_BITS[tensor.dtype] // 8
    before, after = (
        cache_bytes(checkpoint, family, geometry, SharingMap()),
        cache_bytes(checkpoint, family, geometry, sharing),
    )
    keys = sum(geometry.keys(index, layer.groups) for index, layer in enumerate(geometry.layers))
    kept = sum(
        geometry.keys(index, len(sharing.own_groups(index, layer))) for index, layer in enumerate(geometry.layers)
    )
    return Savings(
        parameters=Change(parameters, parameters - removed),
        checkpoint_bytes=Change(size, size - removed_size),
        cache_bytes_per_token=Change(before, after),
        key_cache_removed=1 - kept / keys,
    )


def cache_bytes(checkpoint: Checkpoint, family: Family, geometry: ModelGeometry, sharing: SharingMap) -> int:
    """Bytes that one token of one sequence adds to the KV cache, in the dtype of the projections.

    With cross-attention, one token that is read and one that is written. 0 for a model without a cache.
    """
    tensors, total = checkpoint.tensors, 0
    for index, layer in enumerate(geometry.layers):
        if not layer.heads or not layer.cached:
            continue
        prefix = attention_prefix(checkpoint, family, geometry.stacks, index)
        value = tensors[f"{prefix}{projection(family, 'value')}.weight"]
        keys = len(sharing.own_groups(index, layer)) * layer.head_dim
        values = layer.groups * layer.head_dim if family.modules.fused else value.shape[0]
        total += (keys + values) * DTYPE_BITS[value.dtype] // 8
    return total
