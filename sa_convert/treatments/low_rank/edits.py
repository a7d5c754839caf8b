"""Which tensors low-rank keys and values change: projections get narrower heads, and bases of keys that no projection
can hold come beside them."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import DTYPE_BITS, FLOATS, TensorEdit, TensorEntry
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.errors import CheckpointError
from sa_convert.read.names import attention_prefix
from sa_convert.treatments.low_rank.narrowed import Narrowed, narrowed_projections
from sa_convert.treatments.low_rank.rules import NAME, is_folded, is_short

if TYPE_CHECKING:
    from sa_convert.treatments.low_rank.learned import LearnedBases


@dataclass(frozen=True)
class Layer:
    """A treated layer. projections: those that change. ranks: of keys whose bases are tensors of their own, by KV
    group. turned: these keys are turned by position, so that they are expanded again. key: the projection that makes
    them. encoder: whether they are reduced by a tensor of its own, too."""

    prefix: str
    projections: tuple[Narrowed, ...]
    ranks: dict[int, int]
    turned: bool
    key: TensorEntry
    encoder: bool
    size: int

    @property
    def bases(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of bases, by name."""
        if not self.ranks:
            return {}
        start, rank = f"{self.prefix}low_rank.", sum(self.ranks.values())
        found: dict[str, tuple[int, ...]] = {f"{start}basis": (rank, self.size)}
        found |= {f"{start}offset": (len(self.ranks), self.size)} if self.turned else {}
        return found | ({f"{start}encoder": (rank, self.size)} if self.encoder else {})


def treated_layers(model: Model, plan: Plan) -> Iterator[tuple[int, Layer]]:
    """Every layer with low-rank keys or values. Raises CheckpointError if its projections are quantised."""
    modules, tensors = model.family.modules, model.checkpoint.tensors
    for index, groups in plan.groups_of(NAME).items():
        prefix, layer = attention_prefix(model, index), model.geometry.layers[index]
        projections = tuple(narrowed_projections(model, plan, index))
        ranks = {group: told["keys"] for group, told in sorted(groups.items()) if "keys" in told}
        ranks = {} if is_folded(modules, layer) else ranks
        key = tensors[f"{prefix}{modules.fused or modules.key}.weight"] if ranks else projections[0].weight
        for tensor in (key, *(each.weight for each in projections)):
            if tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"'{tensor.name}' is {tensor.dtype}, which cannot be made narrower: convert the unquantised model."
                )
        yield index, Layer(prefix, projections, ranks, layer.rotary, key, not is_short(modules, layer), layer.head_dim)


def awaited(model: Model, plan: Plan) -> dict[str, TensorEdit]:
    """What goes, and what comes with which shapes, before it is known what the new tensors hold."""
    edits: dict[str, TensorEdit] = {}
    for _, layer in treated_layers(model, plan):
        for each in layer.projections:
            edits |= each.edits()
        made = {name: (shape, each.weight) for each in layer.projections for name, shape in each.shapes.items()}
        made |= {name: (shape, layer.key) for name, shape in layer.bases.items()}
        for name, (shape, source) in made.items():
            size = prod(shape) * DTYPE_BITS[source.dtype] // 8
            entry = TensorEntry(name, source.dtype, shape, Path(), 0, size)
            edits[name] = TensorEdit(replacement=entry, after=source.name)
    return edits


def fitted(model: Model, plan: Plan, learned: "LearnedBases") -> Fitted:
    """The new tensors, in the dtype of those that they come from."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    after: dict[str, str] = {}
    for index, layer in treated_layers(model, plan):
        for each in layer.projections:
            dtype = getattr(torch, FLOATS[each.weight.dtype])
            for name, tensor in each.made(index, learned).items():
                tensors[name], after[name] = tensor.to(dtype), each.weight.name
        bases = [learned.basis(index, group, rank) for group, rank in layer.ranks.items()]
        for name in layer.bases:
            part = name.rpartition(".")[2]
            join = torch.stack if part == "offset" else torch.cat
            made: torch.Tensor = join([getattr(one, part) for one in bases])
            tensors[name] = made.to(getattr(torch, FLOATS[layer.key.dtype]))
            after[name] = layer.key.name
    return Fitted(tensors, after)
