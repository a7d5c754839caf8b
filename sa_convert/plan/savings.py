"""What a plan removes, computed from headers and the plan."""

from collections.abc import Mapping
from math import prod

from sa_convert.domain.change import Change, Savings
from sa_convert.domain.checkpoint import DTYPE_BITS, TensorEdit
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.read.names import attention_prefix, projection
from sa_convert.treatments.plan_answers import layer_answers


def plan_savings(model: Model, plan: Plan, edits: Mapping[str, TensorEdit]) -> Savings:
    """Parameters, bytes of the tensors, and cache bytes per token of one sequence, before and after."""
    parameters = removed = size = removed_size = 0
    for tensor in model.checkpoint.tensors.values():
        parameters += tensor.elements
        size += tensor.bytes
    for name, edit in edits.items():
        before, after = model.checkpoint.tensors.get(name), edit.replacement
        if before is not None:
            removed += before.elements
            removed_size += before.bytes
        if after is not None:
            removed -= after.elements
            removed_size -= after.bytes
        elif before is not None:
            kept = prod(edit.shape(before))
            removed -= kept
            removed_size -= kept * DTYPE_BITS[before.dtype] // 8
    keys = [_keys(model, Plan()), _keys(model, plan)]
    return Savings(
        parameters=Change(parameters, parameters - removed),
        checkpoint_bytes=Change(size, size - removed_size),
        cache_bytes_per_token=Change(bytes_per_token(model, Plan()), bytes_per_token(model, plan)),
        key_cache_removed=1 - keys[1] / keys[0],
    )


def bytes_per_token(model: Model, plan: Plan) -> int:
    """Bytes that the first token of one sequence adds to the KV cache, in the dtype of the projections.

    With cross-attention, one token that is read and one that is written. 0 for a model without a cache.
    """
    return cache_at(model, plan, 1) - cache_at(model, plan, 0)


def cache_at(model: Model, plan: Plan, tokens: int) -> int:
    """Bytes of the KV cache of one sequence of so many tokens, in the dtype of the projections."""
    total = 0
    for index, layer in enumerate(model.geometry.layers):
        if layer.heads and layer.cached:
            answers = layer_answers(plan, model.geometry, index, value_size(model, index))
            dtype = model.checkpoint.tensors[_value_name(model, index)].dtype
            total += sum(found.cached(tokens) for found in answers) * DTYPE_BITS[dtype] // 8
    return total


def value_size(model: Model, index: int) -> int:
    """Elements of one head's value, which may be of another size than its key."""
    layer = model.geometry.layers[index]
    if model.family.modules.fused:
        return layer.head_dim
    shape = model.checkpoint.tensors[_value_name(model, index)].shape
    return shape[1 if model.family.modules.transposed else 0] // layer.groups


def _value_name(model: Model, index: int) -> str:
    """That of the layer, or of another one of its stack if it has no attention any more."""
    layers, module = model.geometry.layers, projection(model.family, "value")
    alike = [at for at, layer in enumerate(layers) if layer.heads and layer.stack == layers[index].stack]
    names = [f"{attention_prefix(model, at)}{module}.weight" for at in (index, *alike)]
    return next(name for name in names if name in model.checkpoint.tensors)


def _keys(model: Model, plan: Plan) -> int:
    """Elements of one token's keys in all layers; see `ModelGeometry.keys`."""
    geometry = model.geometry
    return sum(
        answers.keys
        for index, layer in enumerate(geometry.layers)
        if layer.heads and geometry.keys(index, 1)
        for answers in layer_answers(plan, geometry, index)
    )
