"""Layers that lose their attention as a whole, and the reference: the unmodified base, whose attention modules are
overruled by hooks. The reference shares no code with sa_convert."""

from contextlib import contextmanager
from pathlib import Path

import torch

from sa_convert.families.table import FAMILIES
from support.tiny_models import attentions_of, save_tiny, save_tokenizer

LENGTH = 32


def recipe_text(layers: dict) -> str:
    """layers: the treatment by the layer's name."""
    planned = "\n".join(f"  {layer}: {treatment}" for layer, treatment in layers.items())
    gate = "gate: {max_perplexity_increase: 100%}"
    return f"plan:\n{planned}\ncalibration: {{sequences: 6, length: {LENGTH}}}\n{gate}\n"


def convert_layers(root: Path, model_type: str, layers: dict, **changes) -> Path:
    """The folder of a tiny model of this type, converted; that of the base is `base` beside it. changes: of the
    base's config."""
    from sa_convert.jobs.converting import ConvertOptions, convert
    from sa_convert.plan.recipe_file import parse_recipe

    save_tiny(model_type, root / "base", **changes)
    save_tokenizer(root / "base")
    recipe = parse_recipe(recipe_text(layers), "layers.yaml")
    convert(str(root / "base"), recipe, root / "out", ConvertOptions(device="cpu", validate=False), "layers.yaml")
    return root / "out"


@contextmanager
def overruled(base, model_type: str, maps: dict):
    """While open, the attention of these layers, by number, puts out what its map makes of its input; None: zero."""
    handles = []
    for number, attention in enumerate(attentions_of(base, FAMILIES[model_type])):
        if number in maps:
            handles.append(attention.register_forward_hook(_hook(model_type, maps[number]), with_kwargs=True))
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


def _hook(model_type, made_of):
    def hook(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        made = torch.zeros_like(output[0]) if made_of is None else made_of(states)
        residual = args[1] if model_type == "bloom" else 0  # its attention adds that itself
        return (made + residual, *output[1:])

    return hook
