"""The reference for windows: an unmodified base model, whose scores are masked by the definition.

It shares no code with sa_convert. While an attention module runs, the scores that reach its softmax are the least
number wherever a query may not see a key. The model runs without a cache, so that keys are numbered from the first.
Eager and SDPA each have a reference, since some models compute different things by them (ALiBi of Falcon).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.forced_softmax import SDPA, SOFTMAX, _watched

Plan = Mapping[int, Mapping[int, tuple[int, int]]]
"""By layer and KV group: sinks, and tokens in the window."""


def in_reach(real: Tensor, sinks: int, tokens: int) -> Tensor:
    """(B, S, S) bool: which keys (last axis) a query sees, of rows whose real tokens are told by `real` (B, S)."""
    return torch.stack([_in_reach(tuple(row), sinks, tokens) for row in real.tolist()])


@cache
def _in_reach(real: tuple[bool, ...], sinks: int, tokens: int) -> Tensor:
    length = len(real)
    first = [place for place in range(length) if real[place]][:sinks]
    return torch.tensor(
        [
            [key <= query and real[key] and (query - key < tokens or key in first) for key in range(length)]
            for query in range(length)
        ]
    )


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's scaled dot product attention gives to its softmax: (B, H, T, S), as its documentation says."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return scores
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill(~attn_mask, least) if attn_mask.dtype == torch.bool else scores + attn_mask


class _Masked(TorchFunctionMode):
    """running: the layers whose attention runs, innermost last."""

    def __init__(self, plan: Plan, groups: int, real: Tensor | None) -> None:
        super().__init__()
        self.plan, self.groups, self.real = plan, groups, real
        self.running: list[int] = []
        self.known: dict[Any, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        scores = args[0] if args else kwargs.get("input")
        plan = self.plan.get(self.running[-1]) if self.running else None
        if plan and func is SDPA:
            seen = self.masked(_scores(*args, **kwargs), plan).softmax(dim=-1)
            value = args[2] if len(args) > 2 else kwargs["value"]
            return seen @ value.repeat_interleave(seen.shape[1] // value.shape[1], dim=1)
        if plan and func in SOFTMAX and scores.dim() > 2:
            return func(self.masked(scores, plan), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def masked(self, scores: Tensor, plan: Mapping[int, tuple[int, int]]) -> Tensor:
        shape, length = scores.shape, scores.shape[-2]  # a learned sink is one key more
        batch = 1 if self.real is None else self.real.shape[0]
        if scores.dim() == 3:
            scores = scores.unflatten(0, (batch, -1))
        rows = scores.shape[0]
        shaped = scores.clone()
        size = scores.shape[1] // self.groups
        for group, window in plan.items():
            unseen = ~self.reach(length, rows, window)
            heads = shaped[:, group * size : (group + 1) * size, :, :length]
            heads.masked_fill_(unseen[:, None], torch.finfo(scores.dtype).min)
        return shaped.reshape(shape)

    def reach(self, length: int, rows: int, window: tuple[int, int]) -> Tensor:
        if (length, rows, window) not in self.known:
            real = torch.ones(rows, length, dtype=torch.bool)
            if self.real is not None:  # later tokens are made by the model; beams stand beside each other
                told = self.real.bool().repeat_interleave(rows // len(self.real), dim=0)[:, :length]
                real[:, : told.shape[1]] = told
            self.known[length, rows, window] = in_reach(real, *window)
        return self.known[length, rows, window]


@contextmanager
def forced_rows(
    attentions: Sequence[nn.Module | None], plan: Plan, groups: int, real: Tensor | None = None
) -> Iterator[None]:
    """While open, the model of these attention modules (by layer) attends by the plan, if it runs without a cache.

    groups: KV groups in a layer. real: (B, S), which tokens of the prompts are; None: all.
    """
    with _watched(_Masked(plan, groups, real), attentions):
        yield
