"""How a checkpoint names the tensors of its attention layers."""

from collections.abc import Mapping
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.model import Model
from sa_convert.domain.stacks import Stacks, in_stack
from sa_convert.errors import CheckpointError
from sa_convert.families.family import Family, Stack

OTHER_BASE = "transformer"
"""Name of the base model in heads that do not call it as the language model does, such as LlamaForQuestionAnswering."""


def attention_config(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The part of config.json that describes the attention: the language model's of a multimodal model.

    Raises CheckpointError if it is missing.
    """
    if family.text is None:
        return config
    inner = config.get(family.text)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"config.json has no '{family.text}', which a model of type '{family.model_type}' needs.")
    return inner


def stack_of(family: Family, stacks: Stacks, layer: int) -> tuple[Stack, int]:
    """The stack of a layer, and its number in it."""
    name, number = in_stack(stacks, layer)
    return next(stack for stack in family.all_stacks if stack.name == name), number


def attention_start(checkpoint: Checkpoint, family: Family, stack: Stack, number: int) -> str:
    """How tensor names of one layer's attention begin, with the closing dot. Raises CheckpointError."""
    return f"{layers_prefix(checkpoint, family, stack)}.{number}.{stack.attention}."


def attention_prefix(model: Model, layer: int) -> str:
    """As `attention_start`, by the number of the layer in the whole model."""
    return attention_start(model.checkpoint, model.family, *stack_of(model.family, model.geometry.stacks, layer))


def layers_prefix(checkpoint: Checkpoint, family: Family, stack: Stack) -> str:
    """How tensor names of the layers begin: "model.layers", or "layers" if the base prefix was not saved."""
    candidates = prefixes(family, stack)
    wanted = projection(family, "query")
    module = f".{stack.attention}.{wanted}."  # with a weight or, quantised, with parts of one
    for prefix in candidates:
        if any(name.startswith(f"{prefix}.") and module in name for name in checkpoint.tensors):
            return prefix
    raise CheckpointError(
        f"The checkpoint has no tensor '{candidates[0]}.0.{stack.attention}.{wanted}.weight', which a model of "
        f"type '{family.model_type}' needs; the weights do not belong to this config.json."
    )


def has_stack(checkpoint: Checkpoint, family: Family, stack: Stack) -> bool:
    """Whether a stack of an encoder-decoder was saved: an encoder may stand alone."""
    starts = tuple(f"{prefix}." for prefix in prefixes(family, stack))
    return any(name.startswith(starts) and f".{stack.attention}." in name for name in checkpoint.tensors)


def prefixes(family: Family, stack: Stack) -> list[str]:
    """Module path of the layers in a checkpoint, the likeliest first: a model without a head lacks the first part, and
    some heads have another name for the base model. transformers also loads a model with a head whose names all begin
    with the first part once more, as when it was saved from inside of another module."""
    paths = [family.files, stack.layers] if family.files else [stack.layers]
    rests = [path.partition(".")[2] for path in paths if "." in path]
    again = [f"{path.partition('.')[0]}.{path}" for path in paths if "." in path]
    return list(dict.fromkeys([*paths, *rests, *(f"{OTHER_BASE}.{path}" for path in (*rests, *paths)), *again]))


def projection(family: Family, side: str) -> str:
    """The module that makes queries, keys or values ("query", "key", "value")."""
    return family.modules.fused or str(getattr(family.modules, side))


def output_name(model: Model, layer: int) -> str:
    """Name of the weight of a layer's output projection."""
    stack, number = stack_of(model.family, model.geometry.stacks, layer)
    start = attention_start(model.checkpoint, model.family, stack, number)
    if model.family.modules.output_outside:
        start = f"{layers_prefix(model.checkpoint, model.family, stack)}.{number}."
    return f"{start}{model.family.modules.output}.weight"
