"""From a sharing map to what happens to each tensor."""

from collections.abc import Iterable

from sa_convert.data.checkpoint import Checkpoint, TensorEdit, TensorEntry
from sa_convert.data.geometry import ModelGeometry
from sa_convert.data.sharing_map import SharingMap
from sa_convert.errors import CheckpointError
from sa_convert.export.shared_attention_families import Family
from sa_convert.read.geometry import attention_prefix


def tensor_edits(
    checkpoint: Checkpoint, family: Family, geometry: ModelGeometry, sharing: SharingMap
) -> dict[str, TensorEdit]:
    """The edits of every tensor that changes: query and key rows of reusing heads go, with their biases and norms."""
    tensors = checkpoint.tensors
    edits: dict[str, TensorEdit] = {}
    for index in sharing.layers:
        layer = geometry.layers[index]
        prefix = attention_prefix(checkpoint, family, index)
        own_heads = sharing.own_heads(index, layer)
        own_groups = sharing.own_groups(index, layer)
        sides = (
            (family.query, family.query_norm, own_heads, layer.heads),
            (family.key, family.key_norm, own_groups, layer.groups),
        )
        for projection, norm, kept, total in sides:
            for name in (f"{prefix}{projection}.weight", f"{prefix}{projection}.bias"):
                if name in tensors:
                    edits[name] = _keep(tensors[name], kept, total)
            if norm:
                edits.update(_norm_edits(tensors, f"{prefix}{norm}.", family.norm, kept, total))
        if family.sinks:
            name = f"{prefix}{family.sinks}"
            edits[name] = _keep(tensors[name], own_heads, layer.heads)
    return {name: edit for name, edit in edits.items() if edit.drops or edit.name or edit.rows is not None}


def _norm_edits(
    tensors: dict[str, TensorEntry], prefix: str, kind: str, kept: tuple[int, ...], total: int
) -> dict[str, TensorEdit]:
    """Edits of a norm of queries or keys, by how the family holds its weights (`Family.norm`)."""
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


def _keep(tensor: TensorEntry, kept: Iterable[int], total: int) -> TensorEdit:
    """Keep these of `total` heads, whose rows lie one after the other along axis 0."""
    if not tensor.shape or tensor.shape[0] % total:
        raise CheckpointError(
            f"Tensor '{tensor.name}' has shape {list(tensor.shape)}, which {total} heads do not divide; "
            "the weights do not belong to this config.json."
        )
    height = tensor.shape[0] // total
    ranges: list[tuple[int, int]] = []
    for head in kept:
        start, stop = head * height, (head + 1) * height
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    if ranges == [(0, tensor.shape[0])]:
        return TensorEdit()
    return TensorEdit(rows=tuple(ranges))
