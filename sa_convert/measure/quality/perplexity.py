"""Perplexity: how well a model predicts text that it was not calibrated on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sa_convert.console.progress import progress
from sa_convert.domain.losses import perplexity_of
from sa_convert.models.task import NEXT_TOKEN, Task


@dataclass(frozen=True)
class Perplexity:
    """loss: mean negative log-likelihood of a token, in nats, or not finite. tokens: how many were predicted."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.perplexity)


def perplexity(
    model: Any,
    sequences: torch.Tensor,
    description: str = "perplexity",
    *,
    batch: int = 1,
    observe: Callable[[torch.Tensor], None] = lambda logits: None,
    task: Task = NEXT_TOKEN,
) -> Perplexity:
    """Perplexity over sequences (N, L) of tokens, `batch` at a time, without a cache.

    task: which tokens are predicted, and from what. The log-probabilities are computed in float32 and added up in
    float64. Stops at the first loss that is not finite. observe: called with the scored logits (predictions,
    vocabulary) of each sequence, in order, in the dtype and on the device of the model.
    """
    total, tokens = 0.0, 0
    with torch.inference_mode(), progress(len(sequences), description, unit="seq") as bar:
        for chunk in sequences.split(batch):
            inputs = task.batch(model, chunk)
            for predictions, targets in inputs.scored_logits(inputs.logits(model)):
                losses = functional.cross_entropy(predictions.float(), targets, reduction="none")
                total += losses.cpu().double().sum().item()
                tokens += losses.numel()
                observe(predictions)
            bar.update(len(chunk))
            if not math.isfinite(total):
                break
    return Perplexity(total / tokens, tokens)
