"""A second reference, for models of any make: probabilities are forced where they are made, at the softmax.

It shares no code with sa_convert, and unlike `forced_attention` asks nothing of the model but that its attention calls
a softmax of torch, or torch's scaled dot product attention, while the attention module runs. Eager and SDPA each have
a reference of their own, since some models compute different things by them (ALiBi of Falcon, padding before a
recurrent layer).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)
SDPA = nn.functional.scaled_dot_product_attention


def _probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's scaled dot product attention multiplies with the values: (B, H, T, S), as its documentation says."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # A row that sees nothing is zero.
    return scores.softmax(dim=-1).nan_to_num(0.0)


class _Forced(TorchFunctionMode):
    """Overwrites the probabilities of borrowers. running: the layers whose attention runs, innermost last."""

    def __init__(self, rows: dict[int, list]) -> None:
        super().__init__()
        self.rows = rows
        self.running: list[int] = []
        self.probabilities: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.running and func is SDPA:
            made = self.force(_probabilities(*args, **kwargs))
            value = args[2] if len(args) > 2 else kwargs["value"]
            return made @ value.repeat_interleave(made.shape[1] // value.shape[1], dim=1)
        result = func(*args, **kwargs)
        # Routers and gates make smaller ones: attention's are (B, H, T, S), or (B * H, T, S).
        if self.running and func in SOFTMAX and result.dim() > 2:
            return self.force(result)
        return result

    def force(self, result: Tensor) -> Tensor:
        layer = self.running[-1]
        assert layer not in self.probabilities, f"two softmaxes in the attention of layer {layer}"
        row = self.rows.get(layer) or ()
        # (B, H, T, S or, if a sink is appended, S + 1: the last column has no value and is dropped later)
        forced = result.clone() if result.dim() == 4 or not row else result.unflatten(0, (-1, len(row))).clone()
        for head, source in enumerate(row):
            if source is not None:
                forced[:, head] = self.of(source[0], len(row))[:, source[1]]
        self.probabilities[layer] = forced.reshape(result.shape)
        return self.probabilities[layer]

    def of(self, layer: int, heads: int) -> Tensor:
        """(B, H, T, S) of a layer that ran."""
        made = self.probabilities[layer]
        return made if made.dim() == 4 else made.unflatten(0, (-1, heads))


@contextmanager
def _watched(mode: _Forced, attentions: Sequence[nn.Module | None]) -> Iterator[None]:
    def enter(layer: int) -> Any:
        return lambda module, args: mode.running.append(layer)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.running.pop()

    handles = []
    for layer, attention in enumerate(attentions):
        if attention is not None:
            handles.append(attention.register_forward_pre_hook(enter(layer)))
            handles.append(attention.register_forward_hook(leave))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forced(model: nn.Module, attentions: Sequence[nn.Module | None], rows: dict[int, list]) -> Iterator[None]:
    """While open, one forward pass of `model` attends by the map.

    attentions: the attention module of each layer, None for a layer without. rows: {layer: [None or
    [source layer, source head], ...]}. AssertionError if attention of a layer in the map made no probabilities.
    """
    mode = _Forced(rows)
    with _watched(mode, attentions):
        yield
    used = set(rows) | {source[0] for row in rows.values() for source in row if source is not None}
    assert used <= set(mode.probabilities), f"no softmax in layers {sorted(used - set(mode.probabilities))}"


@torch.no_grad()
def forced_logits(
    model: nn.Module, attentions: Sequence[nn.Module | None], rows: dict[int, list], ids: Tensor, **inputs: Any
) -> Tensor:
    """Logits (B, T, vocabulary) of the unmodified model under the map."""
    with forced(model, attentions, rows):
        return model(ids, **inputs, use_cache=False).logits


@torch.no_grad()
def attending(model: nn.Module, attentions: Sequence[nn.Module | None], ids: Tensor) -> list[int]:
    """The layers whose attention makes probabilities when `model` runs: cross-attention without an encoder does not."""
    mode = _Forced({})
    with _watched(mode, attentions):
        model(ids, use_cache=False)
    return sorted(mode.probabilities)
