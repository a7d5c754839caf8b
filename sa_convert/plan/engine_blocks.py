"""Models whose dropped and merged layers an engine knows by itself, as those of Nemotron-NAS (`DeciLMForCausalLM`).

The folder is one with code, which transformers runs. Besides, config.json names the engine's class, and says of every
layer whether it has attention, and how many query heads a KV group of it has, as `block_configs`. A layer without
attention lacks the norm before it, too.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.domain.stock import StockForm
from sa_convert.errors import PlanError, UnsupportedModelError
from sa_convert.families.family import StockBlocks
from sa_convert.families.table import FAMILIES
from sa_convert.read.family_of import architecture_of
from sa_convert.read.names import layers_prefix, stack_of
from sa_convert.treatments.merge.rules import merged_layers

if TYPE_CHECKING:
    from sa_convert.plan.engines import Engine

IN_BLOCKS = ("merge", "drop")
"""The treatments that can be told so."""

FIRST = 0
"""The layer that needs attention: the engine's class begins the residual stream there."""

OPTIONS = "--trust-remote-code"
"""For the configuration class in the folder: no engine has one for such a config.json."""


def blocks_of(model: Model, engine: "Engine") -> StockBlocks:
    """What the model's family says. Raises UnsupportedModelError, with the reason, if an engine's class cannot be told
    which of its layers have no attention, or fewer KV groups."""
    family, blocks = model.family, model.family.stock_blocks
    start = f"for: {engine.name}: layers of models of type '{family.model_type}'"
    if blocks is None:
        known = ", ".join(sorted(name for name in FAMILIES if FAMILIES[name].stock_blocks))
        raise UnsupportedModelError(
            f"{start} cannot be without attention, or with fewer KV groups, there: no class of {engine.title} is told "
            f"of any. Types that can: {known}. Without 'for', the folder's code runs them."
        )
    found = architecture_of(model.checkpoint.config, family)
    start = f"{start} can be without attention, or with fewer KV groups,"
    if found != family.default_class:
        raise UnsupportedModelError(f"{start} only if it is a {family.default_class}, and this is a {found}.")
    window = next((layer.window for layer in model.geometry.layers if layer.window is not None), None)
    if window is not None:
        raise UnsupportedModelError(f"{start} only if none has a window, and here some have one of {window} tokens.")
    return blocks


def blocks_form(model: Model, plan: Plan, engine: "Engine") -> StockForm:
    """How a plan that drops or merges layers is written. Raises PlanError for what else it does, and as `blocks_of`."""
    blocks, merged = blocks_of(model, engine), merged_layers(plan)
    for index, planned in plan.layers.items():
        if planned != "drop" and index not in merged:
            raise PlanError(
                f"Layer {plan.label(index)}: {engine.title} has a class for windows of layers, and one for layers "
                "without attention or with fewer KV groups, and none for anything else beside these: drop or merge "
                "layers only, or none."
            )
    if FIRST in plan.layers_of("drop"):
        raise PlanError(
            f"Layer {plan.label(FIRST)}: {blocks.architecture} of {engine.title} needs attention in the first layer: "
            "leave it as it is."
        )
    return StockForm(
        engine=engine.name,
        config={"architectures": [blocks.architecture], "block_configs": _block_configs(model, plan, blocks)},
        layers={},
        options=OPTIONS,
        modules={"gone_norm": blocks.norm},
    )


def norm_edits(model: Model, plan: Plan, form: StockForm) -> dict[str, TensorEdit]:
    """The norms that layers without attention lose in such a form."""
    found: dict[str, TensorEdit] = {}
    for index in plan.layers_of("drop"):
        stack, number = stack_of(model.family, model.geometry.stacks, index)
        start = f"{layers_prefix(model.checkpoint, model.family, stack)}.{number}.{form.modules['gone_norm']}."
        found |= {name: TensorEdit(rows=()) for name in model.checkpoint.tensors if name.startswith(start)}
    return found


def _block_configs(model: Model, plan: Plan, blocks: StockBlocks) -> list[dict[str, Mapping[str, Any]]]:
    """Of every layer, with the keys of Nemotron-NAS that engines read."""
    merged = merged_layers(plan)
    config = {**blocks.fills, **{key: value for key, value in model.checkpoint.config.items() if value is not None}}
    ffn = {"no_op": False, "intermediate_size": config["intermediate_size"]}
    return [
        {
            "attention": (
                {"no_op": True, "n_heads_in_group": None}
                if plan.layers.get(index) == "drop"
                else {"no_op": False, "n_heads_in_group": layer.heads // merged.get(index, layer.groups)}
            ),
            "ffn": ffn,
        }
        for index, layer in enumerate(model.geometry.layers)
    ]
