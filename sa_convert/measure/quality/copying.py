"""The in-context copying probe: random tokens, repeated. What perplexity on prose hides, it shows.

Random tokens cannot be predicted from what a model knows of language, so the loss on a repetition tells how well it
finds and copies what stands `period` tokens before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sa_convert.console.progress import progress
from sa_convert.domain.evaluation import CopyingLoss
from sa_convert.models.arguments import last_logits_only
from sa_convert.models.device import input_device
from sa_convert.models.tokens import ordinary_tokens, start_tokens

PERIOD = 128
LENGTH = 512
PROBES = 8
DISTANCES = (32, 64, 128, 256)
SHORTEST = 64
"""The shortest distance that is probed in long context."""


@dataclass(frozen=True)
class Probes:
    """Probes of one length for a model. vocabulary: tokens to draw from. start: what comes before any text."""

    vocabulary: tuple[int, ...]
    start: tuple[int, ...]
    length: int
    seed: int

    @classmethod
    def of(cls, tokenizer: Any, embeddings: int, length: int = LENGTH, seed: int = 0) -> "Probes":
        """embeddings: how many tokens the model has. length: LENGTH, or its positions if fewer. Raises DataError."""
        return cls(tuple(ordinary_tokens(tokenizer, embeddings)), tuple(start_tokens(tokenizer)), length, seed)

    @property
    def period(self) -> int:
        """PERIOD, or what of it can occur twice."""
        return max(1, min(PERIOD, (self.length - len(self.start)) // 2))

    @property
    def distances(self) -> tuple[int, ...]:
        """All periods to probe: those of DISTANCES that can occur twice, and `period`."""
        most = (self.length - len(self.start)) // 2
        return tuple(sorted({*(distance for distance in DISTANCES if distance <= most), self.period}))

    @property
    def long_distances(self) -> tuple[int, ...]:
        """Powers of two from SHORTEST to half of the length. The last token may be cut off by the end of the probe."""
        found = []
        distance = SHORTEST
        while 2 * distance <= self.length:
            found.append(distance)
            distance *= 2
        return tuple(found)

    def tokens(self, period: int) -> torch.Tensor:
        """Probes (PROBES, length) of this period."""
        return copying_probes(self.vocabulary, period=period, length=self.length, seed=self.seed, start=self.start)

    def losses(self, model: Any) -> tuple[CopyingLoss, ...]:
        """Of all distances; only that of `period` goes beyond the second occurrence."""
        losses = []
        for distance in self.distances:
            probes = self.tokens(distance)
            if distance == self.period:
                losses.append(copying_loss(model, probes, distance, f"copying over {distance} tokens"))
            else:
                losses.append(self.loss_at(model, distance))
        return tuple(losses)

    def loss_at(self, model: Any, distance: int) -> CopyingLoss:
        """Of the second occurrence of so many random tokens. Whatever the length is, the tokens are the same."""
        probes = self.tokens(distance)[:, : len(self.start) + 2 * distance]
        return copying_loss(model, probes, distance, f"copying over {distance} tokens")


def copying_probes(
    vocabulary: Sequence[int],
    *,
    period: int = PERIOD,
    length: int = LENGTH,
    probes: int = PROBES,
    seed: int = 0,
    start: Sequence[int] = (),
) -> torch.Tensor:
    """Probes (probes, length), int64: `start`, then `period` random tokens repeated to the end, the last time perhaps
    in part.

    No token occurs twice in a period, unless the vocabulary is smaller than the period: then each occurs about equally
    often. start: tokens that the tokenizer puts before a text. The same arguments give the same probes.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(vocabulary, dtype=torch.long)
    filled = length - len(start)
    rows = []
    for _ in range(probes):
        drawn = [torch.randperm(len(tokens), generator=generator) for _ in range(-(-period // len(tokens)))]
        once = tokens[torch.cat(drawn)[:period]]
        rows.append(torch.cat([torch.tensor(start, dtype=torch.long), once.repeat(-(-filled // period))[:filled]]))
    return torch.stack(rows)


def copying_loss(model: Any, probes: torch.Tensor, period: int, description: str = "copying") -> CopyingLoss:
    """Mean loss of the tokens of `probes` (N, L) from the second occurrence of the period on, without a cache.

    These are the tokens that equal the one `period` before, so tokens at the start that do not repeat do not count. The
    log-probabilities are computed in float32 and added up in float64; a loss that is not finite is returned as it is.
    Raises ValueError if nothing repeats.
    """
    length = probes.shape[1]
    copied = probes[:, period:] == probes[:, :-period]
    repeats = copied.all(dim=0).nonzero()
    if not len(repeats):
        raise ValueError(f"no token of the probes occurs again after {period} tokens")
    begin = int(repeats[0]) + period  # the second occurrence
    few = last_logits_only(model, length - begin + 1)
    losses = torch.zeros(len(probes), length - begin, dtype=torch.float64)
    with torch.inference_mode(), progress(len(probes), description, unit="probe") as bar:
        for number, probe in enumerate(probes):
            logits = model(input_ids=probe[None].to(input_device(model)), use_cache=False, **few).logits[0]
            logits = logits[begin - 1 - length : -1]
            targets = probe[begin:].to(logits.device)
            losses[number] = functional.cross_entropy(logits.float(), targets, reduction="none")
            bar.update()
    means = losses.mean(dim=0)
    return CopyingLoss(
        distance=period,
        tokens=losses.numel(),
        loss=means.mean().item(),
        by_occurrence=tuple(occurrence.mean().item() for occurrence in means.split(period)),
        probes=tuple(losses[:, :period].mean(dim=1).tolist()),
    )
