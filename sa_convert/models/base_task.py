"""What a task is: it says which tokens of a sequence are scored, and makes of sequences and scored tokens what a model
is called with. What is scored depends on the sequence and the seed alone, so that all models are asked the same.

Letters in shape comments: B sequences, L tokens of a sequence, P positions of the logits, N scored predictions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch

from sa_convert.domain.report import PredictionTask
from sa_convert.errors import DataError

Frame = tuple[tuple[int, ...], tuple[int, ...]]
"""What a tokenizer puts before and after a text."""

MASKED_PART = 0.15
"""The part of a sequence's tokens that is masked, or cut out in spans."""


@dataclass(frozen=True)
class Inputs:
    """A batch. kwargs: what the model is called with, tensors on its device, no cache. labels: (B, P) int64 and scored:
    (B, P) bool, both on the CPU: what the logits at each position predict, and whether that counts."""

    kwargs: Mapping[str, Any]
    labels: torch.Tensor
    scored: torch.Tensor

    def logits(self, model: Any) -> torch.Tensor:
        """(B, P, vocabulary), in the model's dtype and on its device."""
        output = model(**self.kwargs)
        # Models with several pretraining heads name that of the masked tokens.
        logits: torch.Tensor = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
        return logits

    def scored_logits(self, logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each sequence the scored logits (N, vocabulary) and their labels (N), both where the logits are."""
        for row, labels, scored in zip(logits, self.labels, self.scored, strict=True):
            yield row[scored.to(row.device)], labels[scored].to(row.device)


@dataclass(frozen=True)
class Decoding:
    """What cached decoding is checked on. tokens: (T,), of the decoder; source: (S,), of the encoder, or None."""

    tokens: torch.Tensor
    source: torch.Tensor | None = None


class Task(ABC):
    """name: as in reports. frame: what every sequence starts and ends with, or None: with the token that starts a text,
    if the tokenizer has one. copies: whether it can show how a model copies random tokens from the context."""

    name: PredictionTask
    frame: Frame | None
    copies: bool = False

    @property
    def inserted(self) -> tuple[int, ...]:
        """Tokens that `batch` puts in."""
        return ()

    @abstractmethod
    def scored(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of the tokens (B, L) are predicted and count: (B, L) bool. Raises DataError for too few tokens."""

    @abstractmethod
    def batch(self, model: Any, tokens: torch.Tensor, scored: torch.Tensor | None = None) -> Inputs:
        """What `model` is called with to predict the scored ones (B, L; None: as `scored` says) of tokens (B, L)."""

    def decoding(self, model: Any, sequence: torch.Tensor) -> Decoding | None:
        """What to decode of a sequence (L) with a cache, or None if the model has none."""
        return None

    def count(self, scored: torch.Tensor) -> int:
        """How many predictions count."""
        return int(scored.sum())


def generator_of(row: torch.Tensor, seed: int) -> torch.Generator:
    """Random numbers that depend on the tokens (L) of a sequence and the seed alone, not on its place among others."""
    return torch.Generator().manual_seed(crc32(row.numpy().tobytes()) ^ (seed & 0xFFFFFFFF))


def too_short(length: int) -> DataError:
    return DataError(f"Sequences of {length} tokens are too short to mask any of them: give longer ones.")
