"""Tiny models with low-rank keys and values in random bases; and the reference, the unmodified base model, whose keys
are projected before it turns them, and whose values are projected as they come out of its projection.

The reference shares no code with sa_convert but the random bases themselves.
"""

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from sa_convert.domain.plan import Plan
from sa_convert.families.table import FAMILIES
from sa_convert.plan.conversion import plan_conversion
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.rewrite.fitted_edits import fitted_edits
from sa_convert.rewrite.rewrite import rewrite_checkpoint
from sa_convert.treatments.low_rank.bases import Basis
from sa_convert.treatments.low_rank.edits import fitted
from sa_convert.treatments.registry import runtime_files
from support.tiny_models import attentions_of, save_tiny

RECIPE = "description: a test\nplan: {0: {0: {low_rank: {keys: 4}}}}\n"


class RandomBases:
    """Bases by layer, KV group, and what they are of; their projections are oblique, as fitted ones are."""

    def __init__(self, size: int) -> None:
        self.size, self.made = size, {}

    def basis(self, layer: int, group: int, rank: int, side: str = "keys") -> Basis:
        if (layer, group, side) not in self.made:
            generator = torch.Generator().manual_seed(100 * layer + group + (50 if side == "values" else 0))
            basis, _ = torch.linalg.qr(torch.randn(self.size, rank, generator=generator))
            other = basis + 0.2 * torch.randn(self.size, rank, generator=generator)
            encoder = torch.linalg.solve(other.T @ basis, other.T)  # encoder @ basis is 1
            mean = (side == "keys") * 0.1 * torch.randn(self.size, generator=generator)
            offset = mean - basis @ (encoder @ mean)
            self.made[layer, group, side] = Basis(basis.T.contiguous(), encoder, offset)
        return self.made[layer, group, side]


def convert(
    root: Path,
    family: str,
    ranks: dict,
    more: dict | None = None,
    values: dict | None = None,
    whole: dict | None = None,
    **changes,
):
    """Save a tiny model of a family in `root`/base, and convert it into `root`/out with keys, and values, of these
    ranks: {layer: {KV group: rank}}. more: other treatments, by layer and KV group. whole: those of whole layers."""
    base = save_tiny(family, root / "base", **changes).eval()
    model = model_of(open_model(str(root / "base")))
    layers = {}
    for side, every in (("keys", ranks), ("values", values or {})):
        for layer, told in every.items():
            for group, rank in told.items():
                layers.setdefault(layer, {}).setdefault(group, {}).setdefault("low_rank", {})[side] = rank
    for layer, told in (more or {}).items():
        for group, treatments in told.items():
            layers.setdefault(layer, {}).setdefault(group, {}).update(treatments)
    plan = Plan({**layers, **(whole or {})}, model.geometry.stacks)
    conversion = plan_conversion(model, parse_recipe(RECIPE, "recipe.yaml"), plan)
    bases = RandomBases(model.geometry.layers[min(layers)].head_dim)
    edits = {**conversion.edits, **fitted_edits(fitted(model, plan, bases), root / "fitted.safetensors")}
    (root / "out").mkdir()
    rewrite_checkpoint(model.checkpoint, model.family, plan, edits, root / "out", runtimes=runtime_files())
    return SimpleNamespace(
        base=base,
        family=family,
        model=model,
        bases=bases,
        conversion=conversion,
        folder=root / "out",
        ranks=ranks,
        values=values or {},
    )


def tensors_of(folder: Path) -> dict:
    """All tensors of a model folder, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# Modules after which keys are as they will be turned, in families that turn a part of each key, or none of it: what the
# module is called, and how keys lie in its output.
PLACES = {
    "gpt_neox": ("query_key_value", "groups"),
    "bloom": ("query_key_value", "groups"),
    "gpt2": ("c_attn", "blocks"),
    "opt": ("k_proj", "flat"),
    "nemotron": ("k_proj", "flat"),
    "phi": ("k_layernorm", "heads"),
    "stablelm": ("k_layernorm", "heads"),
    "bart": ("k_proj", "flat"),
    "t5": ("k", "flat"),
}
# The same, of the layers that do not turn keys in families that turn those of others.
UNTURNED = {
    "falcon": ("query_key_value", "groups"),  # with ALiBi
    "smollm3": ("k_proj", "flat"),
    "cohere2": ("k_proj", "flat"),
    "exaone4": ("k_norm", "heads"),
    "llama4_text": ("k_proj", "flat"),
    "jamba": ("k_proj", "flat"),
}


@contextmanager
def projected_values(found):
    """While open, values of the treated groups are projected."""
    attentions, modules = list(attentions_of(found.base, FAMILIES[found.family])), FAMILIES[found.family].modules

    def project(layer, output):
        size, geometry = found.bases.size, found.model.geometry.layers[layer]
        heads = output.unflatten(-1, (-1, size)).clone()  # (B, T, places, D)
        places = list(range(heads.shape[2] - geometry.groups, heads.shape[2]))
        if modules.fused and modules.fused_order == "groups":
            places = list(range(geometry.group_size + 1, heads.shape[2], geometry.group_size + 2))
        for group, rank in found.values[layer].items():
            one = found.bases.basis(layer, group, rank, "values")
            heads[:, :, places[group]] = heads[:, :, places[group]] @ (one.basis.T @ one.encoder).T
        return heads.flatten(-2)

    handles = [
        attentions[layer]
        .get_submodule(modules.fused or modules.value)
        .register_forward_hook(lambda _, args, output, layer=layer: project(layer, output))
        for layer in found.values
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def projected(found):
    """While open, keys and values of the treated groups are projected."""
    with projected_keys(found) if found.ranks else nullcontext(), projected_values(found):
        yield


@contextmanager
def projected_keys(found):
    """While open, keys of the treated groups are projected before the base turns them."""
    attentions, geometry = list(attentions_of(found.base, FAMILIES[found.family])), found.model.geometry
    handles = []
    for layer in found.ranks:
        place = UNTURNED if found.family in UNTURNED and not geometry.layers[layer].rotary else PLACES
        if found.family in place:
            name, order = place[found.family]
            module = attentions[layer].get_submodule(name)
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output, layer=layer, order=order: _projected_in(found, layer, output, order)
                )
            )
    module = sys.modules[type(found.base).__module__]
    if len(handles) == len(found.ranks) or not hasattr(module, "apply_rotary_pos_emb"):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        return
    original, running = module.apply_rotary_pos_emb, []
    handles += [
        attention.register_forward_pre_hook(lambda *_, layer=layer: running.append(layer))
        for layer, attention in enumerate(attentions)
        if attention is not None
    ]

    def apply(q, k, *args, **kwargs):
        return original(q, _projected(found, running[-1], k), *args, **kwargs)

    module.apply_rotary_pos_emb = apply
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = original
        for handle in handles:
            handle.remove()


def _projected(found, layer: int, keys: torch.Tensor) -> torch.Tensor:
    """keys: (B, G, T, D)"""
    keys = list(keys.unbind(1))
    for group, rank in found.ranks.get(layer, {}).items():
        one = found.bases.basis(layer, group, rank)
        keys[group] = keys[group] @ (one.basis.T @ one.encoder).T + one.offset
    return torch.stack(keys, dim=1)


def _projected_in(found, layer: int, output: torch.Tensor, order: str) -> torch.Tensor:
    size = found.bases.size
    if order == "heads":
        return _projected(found, layer, output)
    if order == "flat":
        keys = output.unflatten(-1, (-1, size)).transpose(1, 2)
        return _projected(found, layer, keys).transpose(1, 2).flatten(2)
    if order == "blocks":
        query, keys, value = output.chunk(3, dim=-1)
        return torch.cat([query, _projected_in(found, layer, keys, "flat"), value], dim=-1)
    parts = output.unflatten(-1, (-1, 3, size)).clone()  # a query, a key and a value for each head
    parts[..., 1, :] = _projected(found, layer, parts[..., 1, :].transpose(1, 2)).transpose(1, 2)
    return parts.flatten(2)


@torch.no_grad()
def projected_logits(found, ids, mask=None, positions=None, **inputs):
    """Logits of the base in eager mode, with projected keys and values and without a cache."""
    found.base.set_attn_implementation("eager")
    told = {} if positions is None else {"position_ids": positions}
    with projected(found):
        return found.base(ids, attention_mask=mask, use_cache=False, **told, **inputs).logits


def modules_with(model: nn.Module, name: str) -> list[nn.Module]:
    """All attention modules that have a part of this name."""
    return [module for module in model.modules() if hasattr(module, name)]
