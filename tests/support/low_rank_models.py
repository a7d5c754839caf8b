"""Tiny models with low-rank keys in random bases, and the reference: the unmodified base model, whose keys are projected
before they are turned by position.

The reference shares no code with sa_convert. What it projects with is read from the written files.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from sa_convert.domain.plan import Plan
from sa_convert.plan.conversion import plan_conversion
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.rewrite.fitted_edits import fitted_edits
from sa_convert.rewrite.rewrite import rewrite_checkpoint
from sa_convert.treatments.low_rank.bases import Basis
from sa_convert.treatments.low_rank.edits import fitted
from sa_convert.treatments.registry import runtime_files
from support.tiny_models import save_tiny

RECIPE = "description: a test\nplan: {0: {0: {low_rank: {keys: 4}}}}\n"


class RandomBases:
    """Bases by layer, KV group and rank; projections are oblique, as fitted ones are."""

    def __init__(self, size: int) -> None:
        self.size, self.made = size, {}

    def basis(self, layer: int, group: int, rank: int) -> Basis:
        if (layer, group) not in self.made:
            generator = torch.Generator().manual_seed(100 * layer + group)
            basis, _ = torch.linalg.qr(torch.randn(self.size, rank, generator=generator))
            other = basis + 0.2 * torch.randn(self.size, rank, generator=generator)
            encoder = torch.linalg.solve(other.T @ basis, other.T)  # encoder @ basis is 1
            mean = 0.1 * torch.randn(self.size, generator=generator)
            self.made[layer, group] = Basis(basis.T.contiguous(), encoder, mean - basis @ (encoder @ mean))
        return self.made[layer, group]


def convert(root: Path, family: str, ranks: dict, more: dict | None = None, dtype=torch.float32, **changes):
    """Save a tiny model of a family in `root`/base, and convert it into `root`/out with keys of these ranks:
    {layer: {KV group: rank}}. more: other treatments of layers. Returns the base, its geometry, and the bases."""
    base = save_tiny(family, root / "base", **changes)
    model = model_of(open_model(str(root / "base")))
    layers = {
        layer: {group: {"low_rank": {"keys": rank}} for group, rank in told.items()} for layer, told in ranks.items()
    }
    for layer, groups in (more or {}).items():
        layers[layer] = {**layers.get(layer, {}), **groups}
    plan = Plan(layers, model.geometry.stacks)
    conversion = plan_conversion(model, parse_recipe(RECIPE, "recipe.yaml"), plan)
    bases = RandomBases(model.geometry.layers[min(ranks)].head_dim)
    edits = {**conversion.edits, **fitted_edits(fitted(model, plan, bases), root / "fitted.safetensors")}
    (root / "out").mkdir()
    rewrite_checkpoint(model.checkpoint, model.family, plan, edits, root / "out", runtimes=runtime_files())
    return SimpleNamespace(base=base, model=model, bases=bases, conversion=conversion, folder=root / "out", ranks=ranks)


def tensors_of(folder: Path) -> dict:
    """All tensors of a model folder, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@contextmanager
def projected_keys(base: nn.Module, found, attentions):
    """While open, keys of the treated groups are projected before `base` turns them; its family has a function for
    that, which is called once for each layer."""
    module = sys.modules[type(base).__module__]
    original = module.apply_rotary_pos_emb
    running: list[int] = []
    handles = [
        attention.register_forward_pre_hook(lambda *_, layer=layer: running.append(layer))
        for layer, attention in enumerate(attentions)
        if attention is not None
    ]

    def apply(q, k, cos, sin, *args, **kwargs):
        keys = list(k.unbind(1))
        for group, rank in found.ranks.get(running[-1], {}).items():
            one = found.bases.basis(running[-1], group, rank)
            width = k.shape[-1]
            keys[group] = keys[group] @ (one.basis.T @ one.encoder)[:width, :width].T + one.offset[:width]
        return original(q, torch.stack(keys, dim=1), cos, sin, *args, **kwargs)

    module.apply_rotary_pos_emb = apply
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = original
        for handle in handles:
            handle.remove()
