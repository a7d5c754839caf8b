"""Folders of tiny models, converted by explicit plans in this process; and plans of windows for any geometry."""

from pathlib import Path

import yaml

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.stacks import layer_label
from sa_convert.jobs.converting import ConvertOptions, convert
from sa_convert.plan.recipe_file import parse_recipe
from support.forced_rows import Plan as Windows
from support.tiny_models import geometry_of_folder


def windows_for(geometry: ModelGeometry) -> dict[int, dict[int, tuple[int, int]]]:
    """Windows of all kinds, by layer and KV group, in the layers that cache what their own stack has read: of some KV
    groups, of all alike, of each another one (one beyond the 8 tokens of the family's own windows), and of none."""
    plan: dict[int, dict[int, tuple[int, int]]] = {}
    layers = [layer for layer, each in enumerate(geometry.layers) if each.heads and each.cached]
    layers = [layer for layer in layers if not geometry.layers[layer].stack.endswith("cross")]
    for place, layer in enumerate(layers):
        groups = range(geometry.layers[layer].groups)
        kinds = (
            {0: (2, 4), groups[-1]: (1, 6)},
            dict.fromkeys(groups, (2, 5)),
            {group: ((0, 3), (3, 10), (1, 4))[group % 3] for group in groups},
            {},
        )
        if kinds[place % 4]:
            plan[layer] = kinds[place % 4]
    return plan


def convert_by_plan(base: Path, layers: dict, output: Path, **keys: object) -> Path:
    """Convert the model in `base`. layers: the plan, by number of the layer in the model. keys: others of a recipe."""
    stacks = geometry_of_folder(base).stacks
    named = {layer_label(stacks, layer): plan for layer, plan in layers.items()}
    recipe = parse_recipe(yaml.safe_dump({"plan": named, **keys}), "plan.yaml")
    convert(str(base), recipe, output, ConvertOptions(device="cpu", validate=False), "plan.yaml")
    return output


def told(windows: Windows) -> dict[int, dict[int, dict]]:
    """Windows as a plan has them."""
    return {
        layer: {group: {"window": {"sinks": sinks, "tokens": tokens}} for group, (sinks, tokens) in groups.items()}
        for layer, groups in windows.items()
    }
