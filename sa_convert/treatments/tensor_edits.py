"""From a plan to what happens to each tensor.

Query heads without scores of their own lose their rows of the query projection, and KV groups without such a head their
rows of the key projection, with biases and norms: whatever the treatments are that make it so. Besides, each treatment
has edits of its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from sa_convert.domain.checkpoint import TensorEdit, TensorEntry
from sa_convert.domain.geometry import LayerGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.errors import CheckpointError
from sa_convert.families.family import Modules
from sa_convert.read.names import attention_prefix
from sa_convert.treatments.fused import kept_of_gated, kept_places
from sa_convert.treatments.plan_answers import own_groups, own_heads
from sa_convert.treatments.registry import used_in


def plan_edits(model: Model, plan: Plan) -> dict[str, TensorEdit]:
    """The edits of every tensor that changes. Raises CheckpointError if tensors do not have the shape of heads."""
    edits: dict[str, TensorEdit] = {}
    for index in plan.layers:
        heads = own_heads(plan, model.geometry, index)
        if len(heads) < model.geometry.layers[index].heads:  # else a fused projection keeps its order
            edits |= _score_edits(model, index, heads)
    for treatment in used_in(plan):
        edits = combined(edits, treatment.edits(model, plan), treatment.name)
    return edits


def combined(first: Mapping[str, TensorEdit], then: Mapping[str, TensorEdit], name: str) -> dict[str, TensorEdit]:
    """Both. Of a tensor that has two edits, what both of them keep stays. name: of what makes the second.

    Raises ValueError for two edits that cannot be had together.
    """
    return {
        **first,
        **{tensor: _both(first.get(tensor), edit, f"{name} and {tensor}") for tensor, edit in then.items()},
    }


def _both(one: TensorEdit | None, other: TensorEdit, where: str) -> TensorEdit:
    if one is None or other.drops:
        return other
    if one.drops:
        return one
    rows = [edit.rows for edit in (one, other) if edit.rows is not None and list(edit.rows) == sorted(edit.rows)]
    if len(rows) < 2 or one.axis != other.axis or one.replacement or other.replacement or one.name or other.name:
        raise ValueError(f"{where}: two treatments edit the tensor, and not both of them by what they keep")
    pairs = ((max(a, c), min(b, d)) for a, b in rows[0] for c, d in rows[1])
    return replace(one, rows=tuple(sorted(pair for pair in pairs if pair[0] < pair[1])))


def _score_edits(model: Model, index: int, heads: tuple[int, ...]) -> dict[str, TensorEdit]:
    """Queries and keys of a layer of which only these heads compute scores."""
    tensors, modules, layer = model.checkpoint.tensors, model.family.modules, model.geometry.layers[index]
    edits: dict[str, TensorEdit] = {}
    prefix = attention_prefix(model, index)
    groups = own_groups(layer, heads)
    axis = 1 if modules.transposed else 0
    for projection, kept, total in _projections(modules, layer, heads, groups):
        for name, along in ((f"{prefix}{projection}.weight", axis), (f"{prefix}{projection}.bias", 0)):
            if name in tensors:
                edits[name] = _keep(tensors[name], kept, total, along)
    for norm, kept, total in ((modules.query_norm, heads, layer.heads), (modules.key_norm, groups, layer.groups)):
        if norm:
            edits.update(_norm_edits(tensors, f"{prefix}{norm}.", modules.norm, kept, total))
    if modules.sinks:
        name = f"{prefix}{modules.sinks}"
        edits[name] = _keep(tensors[name], heads, layer.heads)
    return {name: edit for name, edit in edits.items() if edit.drops or edit.name or edit.rows is not None}


def _projections(
    modules: Modules, layer: LayerGeometry, own_heads: tuple[int, ...], own_groups: tuple[int, ...]
) -> Iterator[tuple[str, Sequence[int], int]]:
    """Each projection that loses rows, the places that it keeps, in heads, and how many places it has."""
    if modules.fused:
        kept = kept_places(modules.fused_order, layer, own_heads, own_groups)
        yield modules.fused, kept, layer.heads + 2 * layer.groups
        return
    if modules.gate == "query":
        yield modules.query, kept_of_gated(layer.heads, own_heads), 2 * layer.heads
    else:
        yield modules.query, own_heads, layer.heads
    yield modules.key, own_groups, layer.groups


def _norm_edits(
    tensors: dict[str, TensorEntry], prefix: str, kind: str, kept: tuple[int, ...], total: int
) -> dict[str, TensorEdit]:
    """Edits of a norm of queries or keys, by how the family holds its weights (`Modules.norm`)."""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not kept:
        return {name: TensorEdit(rows=()) for name in found}
    if kind == "rows":
        return {name: _keep(tensor, kept, total) for name, tensor in found.items()}
    if kind == "list":
        edits = {}
        for name in found:
            # q_layernorm.norms.5.weight: the norm of head 5
            before, after = name.split(".norms.")
            head, leaf = after.split(".", 1)
            if int(head) not in kept:
                edits[name] = TensorEdit(rows=())
            elif kept.index(int(head)) != int(head):
                edits[name] = TensorEdit(name=f"{before}.norms.{kept.index(int(head))}.{leaf}")
        return edits
    return {}  # one weight for all heads: it stays while one of them stays


def _keep(tensor: TensorEntry, kept: Iterable[int], total: int, axis: int = 0) -> TensorEdit:
    """Keep these of `total` places, which lie one after the other along an axis, in this order."""
    if len(tensor.shape) <= axis or tensor.shape[axis] % total:
        raise CheckpointError(
            f"Tensor '{tensor.name}' has shape {list(tensor.shape)}, which {total} heads do not divide; "
            "the weights do not belong to this config.json."
        )
    height = tensor.shape[axis] // total
    ranges: list[tuple[int, int]] = []
    for place in kept:
        start, stop = place * height, (place + 1) * height
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    if ranges == [(0, tensor.shape[axis])]:
        return TensorEdit()
    return TensorEdit(rows=tuple(ranges), axis=axis)
