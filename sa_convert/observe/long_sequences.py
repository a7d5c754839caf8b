"""Long sequences: of text, and of random tokens that come again after longer than any window on offer.

At 512 tokens every window looks free, and text does not show which KV groups find what was said long ago. Random
repetition does, if its period is longer than the window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sa_convert.errors import DataError
from sa_convert.models.task import NEXT_TOKEN
from sa_convert.models.tokens import ordinary_tokens, start_tokens, token_sequences
from sa_convert.observe.recalled_facts import WORDS, recalled
from sa_convert.observe.sequences import REPETITION, REPETITION_WEIGHT, Sample
from sa_convert.texts.text import Text

LENGTH = 2048
"""Tokens of a sequence, unless the model or the search needs fewer."""

SHORTEST = 64
"""Tokens below which nothing is a long sequence."""

SCORED = 768
"""Predictions of a sequence that count at the most, spread evenly: their logits are what takes memory."""

TEXTS = {"calibration": ("prose", "code", "prose", "prose"), "held out": ("prose", "code")}

PERIODS: dict[str, tuple[tuple[float, ...], ...]] = {
    "calibration": ((0.683,), (0.54,), (0.34,), (0.17, 0.1, 0.05)),
    "held out": ((0.6,), (0.3, 0.12)),
}
"""Of each sequence of repetition, as parts of its length. A sequence of several periods has a passage of each."""

RECALLED = {"calibration": 2, "held out": 1}
"""Sequences of text with facts that are asked for at the end."""

RECALL_WEIGHT = 0.5
"""What all of these count beside all text."""


@dataclass(frozen=True)
class LongSet:
    """fit: what is learned from. held_out: what choices are judged on. No repetition has a period of the other part."""

    length: int
    fit: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def long_set(tokenizer: Any, embeddings: int, text: Text, length: int, seed: int = 0) -> LongSet:
    """Sequences of `length` tokens of the calibration part of a text, from its end on, and of repetition.

    embeddings: how many tokens the model has. Raises DataError if the text is too short.
    """
    rows = _text_rows(tokenizer, text, length)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.tensor(ordinary_tokens(tokenizer, embeddings))
    start = torch.tensor(start_tokens(tokenizer), dtype=torch.long)
    parts = {}
    for part, periods in PERIODS.items():
        plain = [
            Sample(tokens, kind, thinned(NEXT_TOKEN.scored(tokens[None])[0]), kept=True) for tokens, kind in rows[part]
        ]
        weight = REPETITION_WEIGHT * len(plain) / len(periods)
        repeated = [_repetition(vocabulary, start, shares, length, generator) for shares in periods]
        facts = [
            recalled(tokenizer, sample.tokens, vocabulary, generator, WORDS[part], start=len(start))
            for sample in plain[: RECALLED[part]]
        ]
        told = RECALL_WEIGHT * len(plain) / max(1, len(facts))
        parts[part] = (
            *plain,
            *(replace(sample, weight=weight) for sample in repeated),
            *(replace(sample, weight=told) for sample in facts if sample is not None),
        )
    return LongSet(length, parts["calibration"], parts["held out"])


def _text_rows(tokenizer: Any, text: Text, length: int) -> dict[str, list[tuple[torch.Tensor, str]]]:
    """Rows of each part. Documents are taken from the last on, since short sequences take them from the first on."""
    calibration = text.split("calibration")
    turned = replace(calibration, documents=calibration.documents[::-1])
    if {document.kind for document in turned.documents} == {"text"}:
        count = sum(map(len, TEXTS.values()))
        rows = [(row, "text") for row in _rows(tokenizer, turned, count, length)]
        first = len(TEXTS["calibration"])
        return {"calibration": rows[:first], "held out": rows[first:]}
    found: dict[str, list[tuple[torch.Tensor, str]]] = {}
    wanted = [kind for kinds in TEXTS.values() for kind in kinds]
    of_kind = {
        kind: iter(_rows(tokenizer, replace(turned, documents=_only(turned, kind)), wanted.count(kind), length))
        for kind in set(wanted)
    }
    for part, kinds in TEXTS.items():
        found[part] = [(next(of_kind[kind]), kind) for kind in kinds]
    return found


def _only(text: Text, kind: str) -> "tuple[Any, ...]":
    return tuple(document for document in text.documents if document.kind == kind)


def _rows(tokenizer: Any, text: Text, count: int, length: int) -> Sequence[torch.Tensor]:
    try:
        return token_sequences(tokenizer, text, count, length).unbind()
    except DataError as error:
        raise DataError(
            f"{error} Windows are searched for on sequences of {length} tokens; a smaller `at` needs less text."
        ) from None


def _repetition(
    vocabulary: torch.Tensor, start: torch.Tensor, shares: Iterable[float], length: int, generator: torch.Generator
) -> Sample:
    """For each period random tokens, said over and over in a passage of its own; predictions count from the second time
    on."""
    periods = [max(2, round(share * length)) for share in shares]
    size = (length - len(start)) // len(periods)
    tokens, scored = [start], [torch.zeros(len(start), dtype=torch.bool)]
    for at, period in enumerate(periods):
        filled = length - len(start) - size * at if at == len(periods) - 1 else size
        once = vocabulary[torch.randint(len(vocabulary), (period,), generator=generator)]
        tokens.append(once.repeat(-(-filled // period))[:filled])
        scored.append(torch.arange(filled) >= period)
    return Sample(torch.cat(tokens), REPETITION, thinned(torch.cat(scored)), kept=True, period=max(periods))


def thinned(scored: torch.Tensor, most: int = SCORED) -> torch.Tensor:
    """At most so many of the tokens (T,) that are scored, spread evenly."""
    places = scored.nonzero()[:, 0]
    if len(places) <= most:
        return scored
    kept = places[torch.linspace(0, len(places) - 1, most).round().long()]
    return torch.zeros_like(scored).index_fill(0, kept, True)
