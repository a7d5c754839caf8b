"""Validation: both models on the same held-out text, copying probes and long context, decode check, and the verdict."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sa_convert.console.progress import tell
from sa_convert.domain.change import CacheBytes, Change
from sa_convert.domain.long_context import LongChange
from sa_convert.domain.losses import LossChange
from sa_convert.domain.model import RunOptions
from sa_convert.domain.report import CopyingReport, PerplexityReport, StoredPerplexity, Validation
from sa_convert.errors import CheckpointError, GateRefused
from sa_convert.measure.quality import long_questions
from sa_convert.measure.quality import stored_dtype as stored
from sa_convert.measure.quality.divergence import Predictions
from sa_convert.measure.quality.long_questions import LongQuestions
from sa_convert.measure.quality.perplexity import Perplexity
from sa_convert.measure.quality.questions import CACHED, Answered, Questions, Use, ask
from sa_convert.measure.quality.verdict import judged
from sa_convert.measure.quality.verdict import refuse_if_failed as refuse_if_failed
from sa_convert.models.load import (
    embedded_tokens,
    load_base,
    load_converted,
    load_tokenizer,
    refuse_foreign_tokens,
    release_memory,
)
from sa_convert.models.placement import Placement, placed, positions
from sa_convert.models.products import precise_products
from sa_convert.models.quiet import keep_module_cache_clean
from sa_convert.models.task import task_of
from sa_convert.models.tokens import long_sequences, token_sequences
from sa_convert.read.folder import read_config
from sa_convert.texts.text import Text

SEQUENCES = 16
LENGTH = 512
KINDS = ("prose", "code")
COMPARED = 4
"""Sequences on which the predictions of both models are compared: their logits wait on disk."""

FILLED, FILLED_ELSEWHERE = 8192, 32768
"""The most tokens that fill a cache to measure it, on a CPU and elsewhere. What more tokens add is computed."""


def validate(
    base: Path,
    converted: Path,
    text: Text,
    max_perplexity_increase: float | None,
    run: RunOptions | None = None,
    *,
    max_copying_increase: float | None = None,
    use: Use | None = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    max_memory: Mapping[int | str, int] | None = None,
) -> Validation:
    """Measure the base model and then the converted one, never both in memory, on the validation part of `text`.

    What the models predict is what `sa_convert.models.task.task_of` says of them: the next token, masked ones, or
    spans. Copying and long context are for the first, the decode check for models with a cache.

    base, converted: folders; the converted model runs by the code in its folder. max_perplexity_increase: the gate,
    0.05 is 5%, or None for no limit. max_copying_increase: in nats, at every distance that is measured. use: what for,
    if that depends on the length of texts; then long context is measured, too. sequences of `length` tokens, fewer
    tokens if the model has fewer positions. max_memory: see `placement.place`.

    Raises DataError (no language-modelling head, no tokenizer, text too short), CheckpointError (a model that cannot be
    loaded), and GateRefused if a perplexity is not finite; every other verdict is in the result, for
    `refuse_if_failed`.
    """
    keep_module_cache_clean()
    held_out = text.split("validation", KINDS)
    config = read_config(base)
    limit = positions(config)
    tokenizer = load_tokenizer(base)
    task = task_of(config, tokenizer, f"The model in {base}")
    tokens = token_sequences(tokenizer, held_out, sequences, min(length, limit or length), task.frame)
    other = load_tokenizer(converted, True)
    same = task == task_of(read_config(converted), other, "The converted model")
    if not (same and tokens.equal(token_sequences(other, held_out, len(tokens), tokens.shape[1], task.frame))):
        raise CheckpointError("The tokenizer in the converted folder makes other tokens than the base model's.")
    placement = placed(base, run or RunOptions())
    if max_memory is not None:
        placement = replace(placement, max_memory=max_memory)
    with TemporaryDirectory(prefix="sa-convert-logits-") as kept, precise_products(placement.device):
        asked = Questions(
            tokens=tokens,
            task=task,
            placement=placement,
            tokenizer=tokenizer,
            limit=limit,
            predictions=Predictions(Path(kept), min(COMPARED, len(tokens))),
            probe_length=min(LENGTH, limit or LENGTH),
            long=_long(tokenizer, held_out, use, limit, placement) if task.copies and use else None,
            use=use,
            cached=min(use.at, limit or use.at, _most_filled(placement)) if use else CACHED,
        )
        before, rounded = _measure_base(base, asked)
        release_memory()
        after, in_files = _measure_converted(converted, asked, before, rounded)
    report = PerplexityReport(
        text=held_out.name,
        tokens=after.perplexity.tokens,
        before=before.perplexity.perplexity,
        after=after.perplexity.perplexity,
        dtype=placement.dtype_name,
        task=task.name,
        stored=in_files,
    )
    validation = Validation(
        perplexity=report,
        decode_check=after.check,
        gate=None,
        cache_bytes_per_token=Change(before.cache_per_token, after.cache_per_token),
        copying=_copying(before, after),
        agreement=asked.predictions.agreement,
        cache=_cache(asked.cached, before, after),
        long=LongChange(before.long, after.long) if before.long and after.long else None,
    )
    return judged(validation, max_perplexity_increase, max_copying_increase)


def _long(tokenizer: Any, text: Text, use: Use, limit: int | None, placement: Placement) -> LongQuestions | None:
    """Texts as long as the model is for, as far as it has positions, and on a CPU as far as that takes minutes at the
    most; shorter ones if the text fills none. None if they would be no longer than ordinary ones."""
    length = min(use.at, limit or use.at)
    if placement.device == "cpu":
        length = min(length, long_questions.LENGTH)
    while length > 1:
        texts = long_sequences(tokenizer, text, long_questions.SEQUENCES, length)
        if texts is not None:
            return LongQuestions(tokenizer, texts)
        tell(f"Text {text.name}: it has fewer than {length} tokens; long text is measured in shorter sequences.")
        length //= 2
    return None


def _most_filled(placement: Placement) -> int:
    return FILLED if placement.device == "cpu" else FILLED_ELSEWHERE


def _measure_base(folder: Path, asked: Questions) -> tuple[Answered, Perplexity | None]:
    """What was measured, and the perplexity of the first sequences in the dtype of the files, if it is another one."""
    placement = asked.placement
    with load_base(folder, placement) as loaded:
        refuse_foreign_tokens(folder, embedded_tokens(loaded.model), asked.tokens, asked.task.inserted)
        answered = ask(loaded.model, asked, "base")
        if not answered.perplexity.finite:
            raise GateRefused(
                f"{folder}: the base model's perplexity is not finite: its weights are damaged, or overflow in "
                f"{placement.dtype_name}: get the model anew, or give a wider --dtype."
            )
        answered = replace(answered, unexpected=loaded.unexpected)
        del loaded
    release_memory()
    if answered.few is None:
        return answered, None
    load = partial(load_base, folder)
    return answered, stored.in_stored_dtype(load, placement, tokens=asked.tokens, task=asked.task, who="base")


def _measure_converted(
    folder: Path, asked: Questions, base: Answered, base_stored: Perplexity | None
) -> tuple[Answered, StoredPerplexity | None]:
    """What was measured, and the comparison in the dtype of the files."""
    placement = asked.placement
    with load_converted(folder, placement, base.unexpected) as loaded:
        answered = ask(loaded.model, asked, "converted", base)
        del loaded
    if not answered.perplexity.finite:
        raise GateRefused(
            "The converted model's perplexity is not finite, though the base model's is: try a recipe that shares "
            "less, or a wider --dtype."
        )
    release_memory()
    if not (answered.few and base.few and base_stored):
        return answered, None
    load = partial(load_converted, folder, unexpected=base.unexpected)
    again = stored.in_stored_dtype(load, placement, tokens=asked.tokens, task=asked.task, who="converted")
    return answered, stored.compared(placement, (base.few, answered.few), (base_stored, again))


def _cache(tokens: int, before: Answered, after: Answered) -> CacheBytes | None:
    if not before.cache.needed:
        return None
    return CacheBytes(before.cache.needed, after.cache.needed, tokens, tokens, after.cache.room)


def _copying(before: Answered, after: Answered) -> CopyingReport | None:
    lost, copied = before.headline, after.headline
    if lost is None or copied is None:
        return None
    distances = tuple(
        (one.distance, LossChange(one.by_probe, other.by_probe))
        for one, other in zip(before.copying, after.copying, strict=True)
    )
    return CopyingReport(copied.distance, copied.tokens, lost.loss, copied.loss, distances)
