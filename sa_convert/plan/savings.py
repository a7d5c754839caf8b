"""What a plan removes, computed from headers and the plan."""

from collections.abc import Iterator, Mapping
from math import prod

from sa_convert.domain.change import CacheBytes, Change, Savings
from sa_convert.domain.checkpoint import DTYPE_BITS, TensorEdit
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.models.placement import positions
from sa_convert.treatments.plan_answers import layer_answers

USED_AT = 4096
"""Tokens of a sequence that a plan is priced for, unless its recipe names another length."""

CONTEXTS = (512, 2048, 4096, 8192)
"""Lengths at which caches are shown."""


def plan_savings(model: Model, plan: Plan, edits: Mapping[str, TensorEdit], at: int) -> Savings:
    """Parameters, bytes of the tensors, and the cache of one sequence, before and after.

    at: tokens of a sequence. What a token adds to the cache is an average over so many, if what it adds depends on the
    length.
    """
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
    per_token, over = Change(bytes_per_token(model, Plan()), bytes_per_token(model, plan)), None
    if depends_on_length(model, plan):
        over = at
        per_token = Change(*(cache_at(model, some, at) // at for some in (Plan(), plan)))
    return Savings(
        parameters=Change(parameters, parameters - removed),
        checkpoint_bytes=Change(size, size - removed_size),
        cache_bytes_per_token=per_token,
        key_cache_removed=key_cache_removed(model, plan),
        cache_over=over,
        caches=tuple(cache_change(model, plan, tokens) for tokens in contexts(model)) if per_token.before else (),
    )


def used_at(model: Model, at: int | None) -> int:
    """Tokens of the sequence that a plan is priced for. at: as the recipe has it."""
    tokens = USED_AT if at is None else at
    return min(tokens, positions(model.checkpoint.config) or tokens)


def contexts(model: Model) -> tuple[int, ...]:
    """Lengths at which the cache is shown: CONTEXTS, and all positions of the model, if they are limited."""
    limit = positions(model.checkpoint.config)
    found = {tokens for tokens in CONTEXTS if limit is None or tokens < limit} | ({limit} if limit else set())
    return tuple(sorted(found))


def cache_change(model: Model, plan: Plan, tokens: int) -> CacheBytes:
    """The cache of one sequence of so many tokens, computed."""
    return CacheBytes(cache_at(model, Plan(), tokens), cache_at(model, plan, tokens), tokens)


def longest_window(model: Model, plan: Plan) -> int | None:
    """The most tokens that a KV group sees which sees fewer than in the base; None: there is none."""
    found = [reach for _, reach in _shortened(model, plan)]
    return max(found, default=None)


def depends_on_length(model: Model, plan: Plan) -> bool:
    """Whether the part of the cache that a plan saves depends on how long the text is."""
    return any(True for _ in _shortened(model, plan))


def _shortened(model: Model, plan: Plan) -> Iterator[tuple[int, int]]:
    """Layer and reach of every KV group that sees fewer tokens than in the base."""
    for index in plan.layers:
        before = layer_answers(Plan(), model.geometry, index)
        for base, treated in zip(before, layer_answers(plan, model.geometry, index), strict=True):
            if treated.reach is not None and treated.reach != base.reach:
                yield index, treated.reach


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
            answers = layer_answers(plan, model.geometry, index)
            total += sum(found.cached(tokens) for found in answers) * DTYPE_BITS[layer.stored] // 8
    return total


def key_cache_removed(model: Model, plan: Plan) -> float:
    """The part of all keys that is gone, 0 to 1."""
    return 1 - _keys(model, plan) / _keys(model, Plan())


def _keys(model: Model, plan: Plan) -> int:
    """Elements of one token's keys in all layers; see `ModelGeometry.keys`."""
    geometry = model.geometry
    return sum(
        answers.keys
        for index, layer in enumerate(geometry.layers)
        if layer.heads and geometry.keys(index, 1)
        for answers in layer_answers(plan, geometry, index)
    )
