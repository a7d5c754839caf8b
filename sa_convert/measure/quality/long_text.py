"""Perplexity of long text by position: what perplexity of short sequences cannot show of a cache that forgets."""

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from sa_convert.console.progress import progress
from sa_convert.domain.long_context import PositionLosses
from sa_convert.domain.losses import Losses
from sa_convert.models.arguments import last_logits_only
from sa_convert.models.device import input_device

BUCKETS = 4
"""Stretches of positions that are told apart; each is as long as all before it."""

ROWS = 512
"""Positions whose losses are computed at once, in float32."""


def token_losses(model: Any, sequences: torch.Tensor, description: str, last: int | None = None) -> torch.Tensor:
    """Losses (N, L - 1) of the tokens of sequences (N, L) but for the first, float64 on the CPU, without a cache.

    One sequence at a time; the log-probabilities are computed in float32. last: only of so many tokens at the end.
    """
    rows, wanted = [], sequences.shape[1] - 1 if last is None else last
    few = {} if last is None else last_logits_only(model, last + 1)
    with torch.inference_mode(), progress(len(sequences), description, unit="seq") as bar:
        for sequence in sequences:
            inputs = sequence[None].to(input_device(model))
            logits = model(input_ids=inputs, use_cache=False, **few).logits[0, -wanted - 1 : -1]
            targets = sequence[-wanted:].to(logits.device)
            parts = [
                functional.cross_entropy(some.float(), true, reduction="none").cpu().double()
                for some, true in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
            ]
            rows.append(torch.cat(parts))
            bar.update()
    return torch.stack(rows)


def by_position(losses: torch.Tensor) -> tuple[PositionLosses, ...]:
    """The means of `token_losses` (N, L - 1) in each stretch of positions."""
    found = []
    for start, stop in pairwise(edges(losses.shape[1] + 1)):
        means = losses[:, max(start, 1) - 1 : stop - 1].mean(dim=1)
        found.append(PositionLosses(start, stop, Losses(tuple(means.tolist()))))
    return tuple(found)


def edges(length: int) -> list[int]:
    """Where the stretches begin, and where the last one ends: 0, 256, 512, 1024, 2048 of 2,048 positions."""
    halves = [length >> number for number in range(BUCKETS)]
    return [0, *sorted({edge for edge in halves if edge > 1})]
