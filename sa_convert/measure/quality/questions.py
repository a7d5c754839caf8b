"""What validation asks of the base model, and of the converted one: each is loaded once, measured, and released."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from sa_convert.domain.evaluation import CopyingLoss
from sa_convert.domain.long_context import LongContext
from sa_convert.domain.report import DecodeCheck
from sa_convert.measure.quality import stored_dtype as stored
from sa_convert.measure.quality.cache_bytes import NOTHING, Held, cache_bytes, cache_bytes_per_token
from sa_convert.measure.quality.copying import Probes, copying_loss
from sa_convert.measure.quality.decode import continues_in, decode_check, rounding_difference
from sa_convert.measure.quality.divergence import Predictions
from sa_convert.measure.quality.long_questions import LongQuestions
from sa_convert.measure.quality.perplexity import Perplexity, perplexity
from sa_convert.measure.quality.walk import in_one_piece, walk, walked_length
from sa_convert.models.load import embedded_tokens
from sa_convert.models.placement import Placement
from sa_convert.models.products import plain_products
from sa_convert.models.task import Decoding, Task

DECODED = 128
CACHED = 16


@dataclass(frozen=True, kw_only=True)
class Use:
    """How the converted model will be used, if what it saves or loses depends on the length. at: tokens of a sequence.
    window: the most tokens that a KV group with a window caches, or None."""

    at: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """tokens: (sequences, length). limit: positions of the models, or None. predictions: those of the base, kept to be
    compared. probe_length: of the copying probe. long: None if nothing is asked of long context. use: None if nothing
    depends on the length. cached: tokens that fill a cache."""

    tokens: torch.Tensor
    task: Task
    placement: Placement
    tokenizer: Any
    limit: int | None
    predictions: Predictions
    probe_length: int
    long: LongQuestions | None = None
    use: Use | None = None
    cached: int = CACHED

    @property
    def window(self) -> int | None:
        return self.use.window if self.use else None


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What was measured of one model. cache_per_token: bytes. cache: of `Questions.cached` tokens. copying: at
    the distance of the probe, and of long context. few: perplexity of the first sequences, if both models are loaded in
    the dtype of their files, too. Of the base: rounding and pieces, for the decode check of the converted model, whose
    result is `check`. unexpected: tensors in the files that the model does not know."""

    perplexity: Perplexity
    cache_per_token: int = 0
    cache: Held = NOTHING
    copying: tuple[CopyingLoss, ...] = ()
    period: int = 0
    long: LongContext | None = None
    few: Perplexity | None = None
    rounding: float = 0.0
    pieces: tuple[int, ...] | None = None
    check: DecodeCheck | None = None
    unexpected: frozenset[str] = frozenset()

    @property
    def headline(self) -> CopyingLoss | None:
        """Of the probe whose period repeats several times."""
        return next((copying for copying in self.copying if copying.distance == self.period), None)


def ask(model: Any, asked: Questions, who: str, base: Answered | None = None) -> Answered:
    """Measure a model, but for decoding. who: "base" or "converted". base: what was measured of the base, if this is
    the converted model. If the perplexity is not finite, that alone is measured."""
    tokens, task, placement = asked.tokens, asked.task, asked.placement
    observe = asked.predictions.keep if base is None else asked.predictions.compare
    measured = perplexity(model, tokens, f"perplexity of the {who} model", observe=observe, task=task)
    if not measured.finite:
        return Answered(perplexity=measured)
    found = Answered(perplexity=measured)
    if stored.is_wider(placement):
        found = replace(found, few=stored.first(model, tokens, task, who))
    with plain_products():
        found = _decoding(model, asked, found, base)
    if not task.copies:
        return found
    probes = Probes.of(asked.tokenizer, embedded_tokens(model), asked.probe_length)
    period = probes.period
    copying: tuple[CopyingLoss, ...] = (copying_loss(model, probes.tokens(period), period, f"copying, {who} model"),)
    long = None
    if asked.long is not None:
        copying = asked.long.copying(model, copying)
        long = asked.long.ask(model, f", {who} model")
    return replace(found, copying=copying, period=period, long=long)


def _decoding(model: Any, asked: Questions, found: Answered, base: Answered | None) -> Answered:
    """The bytes of the cache, and what is known of decoding."""
    decoding = decoded(asked.task, model, asked.tokens, asked.window, asked.limit)
    if decoding is None:
        return found
    stored_as, tokens, source = asked.placement.stored, asked.tokens.flatten(), decoding.source
    if source is not None:
        tokens, source = decoding.tokens, repeated(source, asked.cached)
    found = replace(
        found,
        cache_per_token=cache_bytes_per_token(model, decoding.tokens[:CACHED], stored_as, decoding.source),
        cache=cache_bytes(model, repeated(tokens, asked.cached), stored_as, source),
    )
    if base is not None:
        check = decode_check(model, decoding.tokens, base.rounding, decoding.source, base.pieces)
        return replace(found, check=check)
    pieces = None
    if asked.window is not None:
        pieces = walk(len(decoding.tokens), asked.window)
        if not continues_in(model, decoding.tokens, pieces, decoding.source):
            pieces = in_one_piece(len(decoding.tokens), asked.window)
    rounding = rounding_difference(model, decoding.tokens, decoding.source, pieces)
    return replace(found, rounding=rounding, pieces=pieces)


def decoded(task: Task, model: Any, tokens: torch.Tensor, window: int | None, limit: int | None) -> Decoding | None:
    """What decoding with a cache is checked on, longer than a window; None if the model caches nothing.

    tokens: (N, L), texts. window: the most tokens that a KV group with a window caches, or None. limit: positions of
    the model, or None.
    """
    decoding = task.decoding(model, tokens[0, :DECODED])
    if decoding is None or window is None:
        return decoding
    length = walked_length(window, limit)
    if decoding.source is None:
        return Decoding(repeated(tokens.flatten(), length))
    return Decoding(repeated(decoding.tokens, length), decoding.source)


def repeated(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """So many of these tokens (T), from the first on again if they are fewer."""
    return tokens.repeat(-(-length // len(tokens)))[:length]
