"""Encoder-decoders are asked for spans of a text: the encoder reads the text without them, the decoder predicts them,
each token from the true ones before it (teacher forcing). How a span is shown depends on what the tokenizer has:

- `<extra_id_0>` and so on, as T5: each span gives way to the next of these sentinels, and the decoder's text is the
  sentinels, each followed by its span, and one more at the end;
- a mask token, as BART: each span gives way to one of it, and the decoder's text is the whole text;
- neither, as Marian: the encoder reads the first half, and the decoder predicts the second.

Only tokens of spans are scored. All sequences of one length have equally many spans and tokens in them, so that batches
need no padding.
"""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from sa_convert.errors import CheckpointError
from sa_convert.models.base_task import MASKED_PART, Decoding, Frame, Inputs, Task, generator_of, too_short
from sa_convert.models.device import input_device

SPAN = 3
"""Mean tokens of a span."""

Shown = tuple[list[int], list[int], list[bool]]
"""One sequence: the encoder's tokens, the decoder's labels, and which of these are scored."""


@dataclass(frozen=True)
class Spans(Task):
    """What the three ways have in common."""

    frame: Frame
    seed: int = 0
    name = "teacher-forced"

    @property
    def most_spans(self) -> int | None:
        """How many spans a sequence may have, or None."""
        return None

    @abstractmethod
    def show(self, tokens: list[int], scored: list[bool]) -> Shown:
        """One sequence (L) with its frame."""

    def scored(self, tokens: torch.Tensor) -> torch.Tensor:
        before, after = map(len, self.frame)
        inside = tokens.shape[1] - before - after
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, chosen in zip(tokens, scored, strict=True):
            chosen[before : before + inside] = self._spans(inside, generator_of(row, self.seed))
        return scored

    def batch(self, model: Any, tokens: torch.Tensor, scored: torch.Tensor | None = None) -> Inputs:
        scored = self.scored(tokens) if scored is None else scored
        shown = [self.show(*row) for row in zip(tokens.tolist(), scored.tolist(), strict=True)]
        source, labels, counted = (torch.tensor(part) for part in zip(*shown, strict=True))
        device = input_device(model)
        return Inputs(
            {
                "input_ids": source.to(device),
                "decoder_input_ids": shifted_right(model, labels.to(device)),
                "use_cache": False,
            },
            labels,
            counted,
        )

    def decoding(self, model: Any, sequence: torch.Tensor) -> Decoding:
        kwargs = self.batch(model, sequence[None]).kwargs
        return Decoding(kwargs["decoder_input_ids"][0], kwargs["input_ids"][0])

    def _spans(self, inside: int, generator: torch.Generator) -> torch.Tensor:
        """(inside,) bool: spans that do not touch each other, nor the ends."""
        cut = max(1, round(MASKED_PART * inside))
        count = max(1, min(round(cut / SPAN), self.most_spans or cut))
        if inside - cut < count + 1:
            raise too_short(inside)
        lengths = torch.zeros(2 * count + 1, dtype=torch.long)
        lengths[1::2] = _parts(cut, count, generator)
        lengths[::2] = _parts(inside - cut, count + 1, generator)
        return (torch.arange(len(lengths)) % 2 == 1).repeat_interleave(lengths)


@dataclass(frozen=True)
class Sentinels(Spans):
    """As T5. sentinels: tokens, in their order."""

    sentinels: tuple[int, ...] = ()

    @property
    def inserted(self) -> tuple[int, ...]:
        return self.sentinels

    @property
    def most_spans(self) -> int:
        return len(self.sentinels) - 1

    def show(self, tokens: list[int], scored: list[bool]) -> Shown:
        source: list[int] = []
        labels: list[int] = []
        counted: list[bool] = []
        unused = iter(self.sentinels)
        for cut, run in _runs(tokens, scored):
            if not cut:
                source += run
                continue
            sentinel = next(unused)
            source.append(sentinel)
            labels += [sentinel, *run]
            counted += [False, *(True for _ in run)]
        end = [next(unused), *self.frame[1]]
        return source, labels + end, counted + [False] * len(end)


@dataclass(frozen=True)
class Infilling(Spans):
    """As BART. mask: a token."""

    mask: int = -1

    @property
    def inserted(self) -> tuple[int, ...]:
        return (self.mask,)

    def show(self, tokens: list[int], scored: list[bool]) -> Shown:
        source = [token for cut, run in _runs(tokens, scored) for token in ([self.mask] if cut else run)]
        return source, tokens, scored


@dataclass(frozen=True)
class SecondHalf(Spans):
    """For a tokenizer without sentinels or a mask token."""

    def _spans(self, inside: int, generator: torch.Generator) -> torch.Tensor:
        if inside < 2:
            raise too_short(inside)
        return torch.arange(inside) >= inside // 2

    def show(self, tokens: list[int], scored: list[bool]) -> Shown:
        start = scored.index(True)
        after = list(self.frame[1])
        return tokens[:start] + after, tokens[start:], scored[start:]


def spans_task(tokenizer: Any, frame: Frame, seed: int = 0) -> Spans:
    """The way that the tokenizer allows."""
    vocabulary = tokenizer.get_vocab()
    sentinels: list[int] = []
    while (name := f"<extra_id_{len(sentinels)}>") in vocabulary:
        sentinels.append(vocabulary[name])
    if len(sentinels) > 1:
        return Sentinels(frame, seed, sentinels=tuple(sentinels))
    if tokenizer.mask_token_id is not None:
        return Infilling(frame, seed, mask=tokenizer.mask_token_id)
    return SecondHalf(frame, seed)


def shifted_right(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads to predict labels (B, T): what comes before each. Raises CheckpointError if the model
    does not say what comes before the first."""
    known = getattr(model.config, "decoder_start_token_id", None)
    if known is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        read: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return read
    start = model.generation_config.decoder_start_token_id if known is None else known
    if start is None:
        raise CheckpointError("config.json has no 'decoder_start_token_id', which the decoder starts with: add it.")
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted


def _runs(tokens: list[int], scored: list[bool]) -> list[tuple[bool, list[int]]]:
    """Stretches of tokens that are cut out or not, in turn."""
    pairs = groupby(zip(scored, tokens, strict=True), key=lambda pair: pair[0])
    return [(cut, [token for _, token in run]) for cut, run in pairs]


def _parts(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) lengths of at least 1 that add up to `total`; all ways to cut it are equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: count - 1].sort().values + 1
    return torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]))
