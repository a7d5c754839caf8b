"""Which weights a model reads when it runs, found by running it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_EXPERTS = ".experts."


@dataclass(frozen=True)
class Weights:
    """matrices: elements of all matrices that each token of a prefill is multiplied with, the output embedding left
    out. head: elements of the output embedding. keeps_one: whether a prefill computes logits of the last token only.
    step_bytes: of all parameters that a decoding step reads, or None without a cache. experts: whether a token really
    uses only some of the experts' weights; all are counted."""

    matrices: int
    head: int
    keeps_one: bool
    step_bytes: int | None
    experts: bool


def weights_of(model: Any, prefill: Callable[[], Any], step: Callable[[], Any] | None, keeps_one: bool) -> Weights:
    """prefill, step: run the model on very few tokens. Rows that are looked up in embeddings are not counted; an output
    embedding is, be it tied to the input's or not."""
    head = model.get_output_embeddings().weight
    passed = parameters_read(model, prefill)
    stepped = parameters_read(model, step) if step else None
    return Weights(
        matrices=sum(p.numel() for p in passed if p.ndim > 1 and p is not head),
        head=head.numel(),
        keeps_one=keeps_one,
        step_bytes=None if stepped is None else sum(p.numel() * p.element_size() for p in stepped),
        experts=any(_EXPERTS in f"{name}." for name, _ in model.named_parameters()),
    )


def parameters_read(model: Any, run: Callable[[], Any]) -> "list[torch.nn.Parameter]":
    """The parameters that any computation of torch in `run` is given, each once, and all experts.

    An embedding that is only looked up in is not among them: few of its rows are read.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    parameters: dict[int, torch.nn.Parameter] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            # Asking a parameter for its dtype or shape reads nothing.
            if getattr(func, "__name__", "") != "embedding" and any(True for _ in _tensors(result)):
                for tensor in _tensors([*args, *(kwargs or {}).values()]):
                    if isinstance(tensor, torch.nn.Parameter):
                        parameters[id(tensor)] = tensor
            return result

    with Watch():
        run()
    for name, parameter in model.named_parameters():
        if _EXPERTS in f"{name}.":
            parameters[id(parameter)] = parameter
    return list(parameters.values())


def _tensors(value: Any) -> "Iterator[torch.Tensor]":
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
