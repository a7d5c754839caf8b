"""Projections with narrower heads: what of a basis goes into which of them.

Keys E k and queries U'q of a KV group have the scores of keys U E k. Values E v, weighed and multiplied with O U, come
out of the layer as values U E v do. So the rows of a group's head in the projection of keys or values become E times
as many rows, and U' times those of queries; the columns of the output projection that read one of its heads become U
times as many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sa_convert.domain.checkpoint import TensorEdit, TensorEntry
from sa_convert.domain.geometry import LayerGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.families.family import Modules
from sa_convert.read.names import attention_prefix, output_name
from sa_convert.treatments.fused import kept_places, places
from sa_convert.treatments.low_rank.rules import NAME, Side, is_folded, is_short
from sa_convert.treatments.share.plans import map_of

if TYPE_CHECKING:
    import torch

    from sa_convert.treatments.low_rank.learned import LearnedBases


@dataclass(frozen=True)
class Part:
    """One head of a projection. at: its place in the base's, counted in heads. rank: numbers that it has from now on,
    or None if it stays. group, side: what its basis is of. by: the matrix of the basis that its rows are multiplied
    with."""

    at: int
    rank: int | None = None
    group: int = 0
    side: Side = "keys"
    by: Literal["encoder", "basis"] = "encoder"


@dataclass(frozen=True)
class Narrowed:
    """A projection. name: of the one that takes its place. parts: its heads from now on, in order. size: numbers that
    a head has in the base. inputs: heads are what it reads, and not what it makes. transposed: it holds (input,
    output)."""

    name: str
    weight: TensorEntry
    bias: TensorEntry | None
    parts: tuple[Part, ...]
    size: int
    inputs: bool = False
    transposed: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are new, by name."""
        rows = sum(self.size if part.rank is None else part.rank for part in self.parts)
        other = self.weight.shape[1 if self.inputs == self.transposed else 0]
        found: dict[str, tuple[int, ...]] = {f"{self.name}.weight": (other, rows) if self.inputs else (rows, other)}
        if self.bias is not None:
            found[f"{self.name}.bias"] = (other,) if self.inputs else (rows,)
        return found

    def edits(self) -> dict[str, TensorEdit]:
        """What happens to the tensors that others take the place of."""
        gone = (self.weight, self.bias)
        return {tensor.name: TensorEdit(rows=()) for tensor in gone if tensor is not None}

    def made(self, layer: int, learned: "LearnedBases") -> "dict[str, torch.Tensor]":
        """The new tensors, float32, by name."""
        weight = _read(self.weight)
        weight = weight.T if self.inputs != self.transposed else weight  # heads lie along the first axis
        found = {f"{self.name}.weight": self._of_heads(weight, layer, learned)}
        if self.inputs:
            found = {name: made.T.contiguous() for name, made in found.items()}
        if self.bias is not None:
            bias = _read(self.bias)
            found[f"{self.name}.bias"] = bias if self.inputs else self._of_heads(bias, layer, learned)
        return found

    def _of_heads(self, tensor: "torch.Tensor", layer: int, learned: "LearnedBases") -> "torch.Tensor":
        """tensor: (heads * D, ...)"""
        import torch

        heads, made = tensor.unflatten(0, (-1, self.size)), []
        for part in self.parts:
            if part.rank is None:
                made.append(heads[part.at])
            else:
                basis = learned.basis(layer, part.group, part.rank, part.side)
                made.append(getattr(basis, part.by) @ heads[part.at])
        return torch.cat(made)


def _read(tensor: TensorEntry) -> "torch.Tensor":
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as shard:
        found: torch.Tensor = shard.get_tensor(tensor.name).float()
    return found


def narrowed_projections(model: Model, plan: Plan, index: int) -> Iterator[Narrowed]:
    """The projections of a treated layer that change."""
    modules, layer = model.family.modules, model.geometry.layers[index]
    told = plan.groups_of(NAME)[index]
    keys, values = ({group: each[side] for group, each in told.items() if side in each} for side in ("keys", "values"))
    shared, folded = map_of(plan, model.geometry), keys if is_folded(modules, layer) else {}
    heads, groups = shared.own_heads(index, layer), shared.own_groups(index, layer)
    query = [Part(head, folded.get(layer.group_of(head)), layer.group_of(head), by="basis") for head in heads]
    key = [Part(group, folded.get(group), group) for group in groups]
    value = [Part(group, values.get(group), group, "values") for group in range(layer.groups)]
    if keys and is_short(modules, layer):  # those in full come first, as they lie in the cache
        key = [Part(group) for group in groups if group not in keys]
        key += [Part(group, rank, group) for group, rank in sorted(keys.items())]
    prefix = attention_prefix(model, index)
    sides = {modules.query: query, modules.key: key, modules.value: value}
    if modules.fused:
        sides = {modules.fused: _in_fused(modules, layer, query, key, value)}
    for name, parts in sides.items():
        if any(part.rank is not None for part in parts):
            yield _narrowed(model, f"{prefix}{name}", "down", parts, layer.head_dim)
    if values:
        every = range(layer.heads)
        output = [Part(h, values.get(layer.group_of(h)), layer.group_of(h), "values", "basis") for h in every]
        name = output_name(model, index).removesuffix(".weight")
        yield _narrowed(model, name, "up", output, layer.head_dim)


def _in_fused(
    modules: Modules, layer: LayerGeometry, query: Sequence[Part], key: Sequence[Part], value: Sequence[Part]
) -> list[Part]:
    """The heads of a fused projection, in the order that they have after the conversion."""
    at = places(modules.fused_order, layer)
    heads = {at.queries[part.at]: part for part in query} | {at.keys[part.at]: part for part in key}
    heads |= {at.values[part.at]: part for part in value}
    every = sorted(heads)
    if len(query) < layer.heads:
        every = kept_places(modules.fused_order, layer, [part.at for part in query], [part.at for part in key])
    return [Part(place, heads[place].rank, heads[place].group, heads[place].side, heads[place].by) for place in every]


def _narrowed(model: Model, start: str, new: str, parts: Sequence[Part], size: int) -> Narrowed:
    tensors, transposed = model.checkpoint.tensors, model.family.modules.transposed
    weight, bias = tensors[f"{start}.weight"], tensors.get(f"{start}.bias")
    return Narrowed(f"{start}.{new}", weight, bias, tuple(parts), size, new == "up", transposed)
