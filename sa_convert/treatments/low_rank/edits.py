"""Which tensors low-rank keys change: new ones hold the bases, and the projection of keys is shorter if it alone makes
the keys."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import DTYPE_BITS, TensorEdit, TensorEntry
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.errors import CheckpointError
from sa_convert.families.family import Modules
from sa_convert.read.names import attention_prefix
from sa_convert.treatments.low_rank.trying import NAME
from sa_convert.treatments.share.plans import map_of

if TYPE_CHECKING:
    from sa_convert.treatments.low_rank.learned import LearnedKeys

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def is_short(modules: Modules) -> bool:
    """Whether the projection of keys becomes shorter; as `is_short` of the runtime has it."""
    return not (modules.fused or modules.transposed or modules.key_norm or modules.value_limit)


@dataclass(frozen=True)
class Layer:
    """A layer with low-rank keys. ranks: by KV group. full: KV groups that keep their keys as they are."""

    prefix: str
    key: TensorEntry
    bias: TensorEntry | None
    short: bool
    size: int
    ranks: dict[int, int]
    full: tuple[int, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are new, by name."""
        rank, hidden = sum(self.ranks.values()), self.key.shape[-1]
        found: dict[str, tuple[int, ...]] = {
            f"{self.prefix}low_rank.basis": (rank, self.size),
            f"{self.prefix}low_rank.offset": (len(self.ranks), self.size),
        }
        if not self.short:
            return {**found, f"{self.prefix}low_rank.encoder": (rank, self.size)}
        rows = len(self.full) * self.size + rank
        start = self.key.name.removesuffix("weight")
        found[f"{start}down.weight"] = (rows, hidden)
        if self.bias is not None:
            found[f"{start}down.bias"] = (rows,)
        return found

    @property
    def dropped(self) -> tuple[TensorEntry, ...]:
        """Tensors that new ones take the place of."""
        return tuple(found for found in (self.key, self.bias) if found is not None) if self.short else ()

    def after(self, name: str) -> str:
        """The tensor of the base that a new one follows."""
        return self.bias.name if self.bias is not None and name.endswith("down.bias") else self.key.name


def treated_layers(model: Model, plan: Plan) -> Iterator[tuple[int, Layer]]:
    """Every layer with low-rank keys. Raises CheckpointError if its keys are quantised."""
    modules, tensors = model.family.modules, model.checkpoint.tensors
    shared = map_of(plan, model.geometry)  # a KV group that borrows has no keys
    for index, groups in plan.groups_of(NAME).items():
        prefix, layer = attention_prefix(model, index), model.geometry.layers[index]
        key = tensors[f"{prefix}{modules.fused or modules.key}.weight"]
        if key.dtype not in _DTYPES:
            raise CheckpointError(
                f"'{key.name}' is {key.dtype}, of which no low-rank keys can be made: convert the unquantised model."
            )
        ranks = {group: told["keys"] for group, told in sorted(groups.items())}
        full = tuple(group for group in shared.own_groups(index, layer) if group not in ranks)
        bias = None if modules.fused else tensors.get(f"{prefix}{modules.key}.bias")
        yield index, Layer(prefix, key, bias, is_short(modules), layer.head_dim, ranks, full)


def awaited(model: Model, plan: Plan) -> dict[str, TensorEdit]:
    """What goes, and what comes with which shapes, before it is known what the new tensors hold."""
    edits: dict[str, TensorEdit] = {}
    for _, layer in treated_layers(model, plan):
        edits |= {tensor.name: TensorEdit(rows=()) for tensor in layer.dropped}
        for name, shape in layer.shapes.items():
            size = prod(shape) * DTYPE_BITS[layer.key.dtype] // 8
            entry = TensorEntry(name, layer.key.dtype, shape, Path(), 0, size)
            edits[name] = TensorEdit(replacement=entry, after=layer.after(name))
    return edits


def fitted(model: Model, plan: Plan, learned: "LearnedKeys") -> Fitted:
    """The new tensors, in the dtype of the projection of keys."""
    import torch
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    after: dict[str, str] = {}
    for index, layer in treated_layers(model, plan):
        dtype = getattr(torch, _DTYPES[layer.key.dtype])
        bases = [learned.basis(index, group, rank) for group, rank in layer.ranks.items()]
        made = {"basis": torch.cat([one.basis for one in bases]), "offset": torch.stack([one.offset for one in bases])}
        made["encoder"] = torch.cat([one.encoder for one in bases])
        for tensor in layer.dropped:
            with safe_open(tensor.file, framework="pt") as shard:
                whole = shard.get_tensor(tensor.name).float().unflatten(0, (-1, layer.size))  # (groups, D, hidden)
            rows = [whole[group] for group in layer.full]
            rows += [one.encoder @ whole[group] for group, one in zip(layer.ranks, bases, strict=True)]
            made[f"down.{tensor.name.rpartition('.')[2]}"] = torch.cat(rows)
        for name in layer.shapes:
            last = name.rpartition(".")[2]
            tensors[name] = made[f"down.{last}" if ".down." in name else last].to(dtype)
            after[name] = layer.after(name)
    return Fitted(tensors, after)
