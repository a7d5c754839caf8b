"""The sequences that search and refit learn from, and others, never learned from, on which they are judged."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from itertools import cycle, islice
from typing import Any

import torch

from sa_convert.models.task import NEXT_TOKEN, Frame, Inputs, Task
from sa_convert.models.tokens import ordinary_tokens, start_tokens, token_sequences
from sa_convert.texts.text import Text

REPETITION = "random repetition"
"""Kind of the samples of random tokens said several times over."""

FACTS = "facts asked for"
"""Kind of the samples of text in which facts are told that are asked for at the end."""

REPETITION_WEIGHT = 0.25
"""What all samples of random repetition count in costs, all others counting 1. Less than for text, since what it costs
to copy random tokens weighs on few texts; without it, copying is lost (docs/quality.md)."""

REPETITION_PART = 5
"""One sample in so many is random repetition."""

HELD_OUT_PART = 4
"""One sample in so many is held out."""

KEEP = "logits_to_keep"
"""Argument of a model's forward: the positions whose logits are wanted."""

_PERIODS = {"calibration": (100, 48, 170, 240, 24), "held out": (72, 200, 36)}


@dataclass(frozen=True)
class Sample:
    """One sequence. tokens: (T,) int64. kind: of text, or REPETITION. scored: (T,) bool, the tokens that count as
    predictions: of a repetition, only those that can be predicted. weight: what it counts in sums of costs. task: how
    they are predicted. kept: only logits of scored tokens are computed, if the model can do so. period: after how many
    tokens a repetition says the same again, at the most."""

    tokens: torch.Tensor
    kind: str
    scored: torch.Tensor
    weight: float = 1.0
    task: Task = NEXT_TOKEN
    kept: bool = False
    period: int = 0

    @property
    def repetition(self) -> bool:
        """Whether what is scored was said before, and random then."""
        return self.kind in (REPETITION, FACTS)

    @property
    def tokens_scored(self) -> int:
        return max(1, self.task.count(self.scored))

    def inputs(self, model: Any) -> Inputs:
        """What a model is called with, a batch of one."""
        inputs = self.task.batch(model, self.tokens[None], self.scored[None])
        if not self.kept or KEEP not in signature(model.forward).parameters:
            return inputs
        (places,) = inputs.scored[0].nonzero(as_tuple=True)
        kept = {KEEP: places.to(inputs.kwargs["input_ids"].device)}
        return Inputs({**inputs.kwargs, **kept}, inputs.labels[:, places], inputs.scored[:, places])


@dataclass(frozen=True)
class CalibrationSet:
    """fit: what is learned from. held_out: what choices (of strengths, of maps) are judged on. text: its name."""

    text: str
    fit: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def calibration_set(
    tokenizer: Any,
    embeddings: int,
    text: Text,
    sequences: int,
    length: int,
    *,
    seed: int = 0,
    written: torch.Tensor | None = None,
    task: Task = NEXT_TOKEN,
) -> CalibrationSet:
    """`sequences` samples of `length` tokens from the calibration part of a text, a fifth of them random repetition,
    which only a model that predicts the next token can learn from.

    embeddings: how many tokens the model has. written: (N, length) tokens that the model itself wrote, which take the
    place of as many of the text. task: how tokens are predicted. No document is in both parts, and no repetition has a
    period of the other part. The same arguments give the same samples. Raises DataError if the text is too short or
    makes no token.
    """
    repetitions = sequences // REPETITION_PART if task.copies else 0
    plain = sequences - repetitions
    own = [] if written is None else [(row, "written by the model") for row in written]
    rows = [*_text_rows(tokenizer, text, plain - len(own), length, task.frame), *own]
    fit, held = _divide(rows)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.tensor(ordinary_tokens(tokenizer, embeddings))
    start = torch.tensor(start_tokens(tokenizer), dtype=torch.long)
    held_out = (repetitions + 1) // 3
    counts = {"calibration": repetitions - held_out, "held out": held_out}
    repeated = {
        part: [
            _repetition(vocabulary, start, min(period, (length - len(start)) // 2), length, generator)
            for period in islice(cycle(_PERIODS[part]), count)
        ]
        for part, count in counts.items()
    }
    return CalibrationSet(
        text.name,
        tuple(_weighed(_plain(fit, task), repeated["calibration"])),
        tuple(_weighed(_plain(held, task), repeated["held out"])),
    )


def _text_rows(
    tokenizer: Any, text: Text, count: int, length: int, frame: Frame | None
) -> list[tuple[torch.Tensor, str]]:
    """Rows of the calibration part. The built-in text: kinds in turn, so that few sequences hold all of them."""
    kinds = ("prose", "code", "prose", "table", "prose", "code", "repetition")
    calibration = text.split("calibration")
    if {document.kind for document in calibration.documents} == {"text"}:
        return [(row, "text") for row in token_sequences(tokenizer, calibration, count, length, frame)]
    order = list(islice(cycle(kinds), count))
    rows = {
        kind: iter(token_sequences(tokenizer, text.split("calibration", (kind,)), order.count(kind), length, frame))
        for kind in set(order)
    }
    return [(next(rows[kind]), kind) for kind in order]


def _divide(rows: list[tuple[torch.Tensor, str]]) -> tuple[list[tuple[torch.Tensor, str]], ...]:
    """To learn from and to hold out, of each kind in proportion. At least one row on either side."""
    held: list[int] = []
    for kind in dict.fromkeys(kind for _, kind in rows):
        of_kind = [at for at, row in enumerate(rows) if row[1] == kind]
        held += of_kind[len(of_kind) - len(of_kind) // HELD_OUT_PART :]
    held = held or [len(rows) - 1]
    return [row for at, row in enumerate(rows) if at not in held], [rows[at] for at in sorted(held)]


def _plain(rows: list[tuple[torch.Tensor, str]], task: Task) -> Iterator[Sample]:
    for tokens, kind in rows:
        yield Sample(tokens, kind, task.scored(tokens[None])[0], task=task)


def _weighed(plain: Iterator[Sample], repeated: list[Sample]) -> Iterator[Sample]:
    samples = list(plain)
    yield from samples
    for sample in repeated:
        weight = REPETITION_WEIGHT * len(samples) / len(repeated)
        yield Sample(sample.tokens, sample.kind, sample.scored, weight)


def _repetition(
    vocabulary: torch.Tensor, start: torch.Tensor, period: int, length: int, generator: torch.Generator
) -> Sample:
    """`period` random tokens said over and over; predictions count from the second time on."""
    once = vocabulary[torch.randint(len(vocabulary), (max(1, period),), generator=generator)]
    filled = length - len(start)
    tokens = torch.cat([start, once.repeat(-(-filled // len(once)))[:filled]])
    scored = torch.arange(length) >= len(start) + len(once)
    return Sample(tokens, REPETITION, scored)
