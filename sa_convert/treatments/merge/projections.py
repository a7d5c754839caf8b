"""The projections of a layer: read head by head, and written for fewer KV groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import FLOATS, TensorEntry
from sa_convert.domain.model import Model
from sa_convert.errors import CheckpointError
from sa_convert.read.names import attention_prefix, output_name
from sa_convert.treatments.merge.bases import Merged, as_numbers, as_pairs

if TYPE_CHECKING:
    import torch


def entries(model: Model, index: int) -> dict[str, TensorEntry]:
    """Every tensor of a layer's projections, as "query.weight" and so on; "output.bias" stays as it is, and is left
    out. Raises CheckpointError if one is quantised."""
    tensors, modules = model.checkpoint.tensors, model.family.modules
    prefix = attention_prefix(model, index)
    found = {"output.weight": output_name(model, index)}
    for side in ("query", "key", "value"):
        for leaf in ("weight", "bias"):
            name = f"{prefix}{getattr(modules, side)}.{leaf}"
            found |= {f"{side}.{leaf}": name} if leaf == "weight" or name in tensors else {}
    for name in found.values():
        if name not in tensors or tensors[name].dtype not in FLOATS:
            kind = tensors[name].dtype if name in tensors else "missing"
            raise CheckpointError(f"'{name}' is {kind}, so no KV groups can be merged: convert the unquantised model.")
    return {side: tensors[name] for side, name in found.items()}


def read_layer(model: Model, index: int) -> "tuple[torch.Tensor, ...]":
    """Queries, keys, values and outputs of a layer's KV groups, float64, as `bases.merged` takes those of some."""
    import torch

    layer, found = model.geometry.layers[index], entries(model, index)

    def rows(side: str) -> "torch.Tensor":
        weight = _read(found[f"{side}.weight"])
        bias = found.get(f"{side}.bias")
        column = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else _read(bias)
        return torch.cat([weight, column[:, None]], dim=1)

    queries = rows("query").unflatten(0, (layer.groups, layer.group_size, -1))
    keys, values = (rows(side).unflatten(0, (layer.groups, -1)) for side in ("key", "value"))
    outputs = _read(found["output.weight"]).unflatten(1, (layer.groups, layer.group_size, -1)).movedim(0, 2)
    return queries, keys, values, outputs


def shapes(model: Model, index: int, groups: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors that a layer with so many KV groups left has in the place of those that `entries` lists."""
    before = model.geometry.layers[index].groups
    return {
        side: (entry.shape[0] // before * groups, *entry.shape[1:])
        if side.startswith(("key", "value"))
        else entry.shape
        for side, entry in entries(model, index).items()
    }


def written(model: Model, index: int, parts: Sequence[Merged]) -> "dict[str, torch.Tensor]":
    """These tensors. parts: for each KV group that is left, what makes it of those that the layer had."""
    import torch

    found = entries(model, index)
    queries, keys, values, outputs = read_layer(model, index)
    count = len(keys) // len(parts)
    key_out = torch.cat([part.key_out for part in parts])[:, None, :, None]  # (G, 1, P, 1)
    value_out = torch.cat([part.value_out.unflatten(0, (count, -1)) for part in parts])  # (G, D, D)
    made = {
        "query": as_numbers(as_pairs(queries, -2) * key_out.conj(), -2).flatten(0, 2),
        "key": torch.cat(
            [
                as_numbers((as_pairs(some, -2) * part.key_in[..., None]).sum(0), -2)
                for some, part in zip(keys.split(count), parts, strict=True)
            ]
        ),
        "value": torch.cat(
            [part.value_in @ some.flatten(0, 1) for some, part in zip(values.split(count), parts, strict=True)]
        ),
    }
    told = {"output.weight": torch.einsum("ghov,gvw->oghw", outputs, value_out).flatten(1)}
    for side, rows in made.items():
        told[f"{side}.weight"], told[f"{side}.bias"] = rows[:, :-1], rows[:, -1]
    return {side: told[side].to(getattr(torch, FLOATS[entry.dtype])).contiguous() for side, entry in found.items()}


def _read(tensor: TensorEntry) -> "torch.Tensor":
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as shard:
        found: torch.Tensor = shard.get_tensor(tensor.name).double()
    return found
