"""Validation: both models on the same held-out text and copying probes, decode check, and verdict of the gate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sa_convert.domain.change import Change
from sa_convert.domain.evaluation import CopyingLoss
from sa_convert.domain.model import RunOptions
from sa_convert.domain.report import CopyingReport, GateResult, PerplexityReport, Validation
from sa_convert.errors import CheckpointError, GateRefused
from sa_convert.measure.quality import stored_dtype as stored
from sa_convert.measure.quality.cache_bytes import cache_bytes_per_token
from sa_convert.measure.quality.copying import Probes, copying_loss
from sa_convert.measure.quality.decode import decode_check, rounding_difference
from sa_convert.measure.quality.divergence import Predictions
from sa_convert.measure.quality.perplexity import Perplexity, perplexity
from sa_convert.models.load import (
    embedded_tokens,
    load_base,
    load_converted,
    load_tokenizer,
    refuse_foreign_tokens,
    release_memory,
)
from sa_convert.models.placement import Placement, placed, positions
from sa_convert.models.quiet import keep_module_cache_clean
from sa_convert.models.task import Task, task_of
from sa_convert.models.tokens import token_sequences
from sa_convert.read.folder import read_config
from sa_convert.texts.text import Text

SEQUENCES = 16
LENGTH = 512
KINDS = ("prose", "code")
COMPARED = 4
"""Sequences on which the predictions of both models are compared: their logits wait on disk."""
DECODED = 128
CACHED = 16


def validate(
    base: Path,
    converted: Path,
    text: Text,
    max_perplexity_increase: float | None,
    run: RunOptions | None = None,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    max_memory: Mapping[int | str, int] | None = None,
) -> Validation:
    """Measure the base model and then the converted one, never both in memory, on the validation part of `text`.

    What the models predict is what `sa_convert.models.task.task_of` says of them: the next token, masked ones, or
    spans. The copying probe is for the first, the decode check for models with a cache.

    base, converted: folders; the converted model runs by the code in its folder. max_perplexity_increase: the gate,
    0.05 is 5%, or None for no limit. sequences of `length` tokens, fewer tokens if the model has fewer positions.
    max_memory: see `placement.place`.

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
    with TemporaryDirectory(prefix="sa-convert-logits-") as kept:
        asked = _Questions(
            tokens=tokens,
            task=task,
            placement=placement,
            predictions=Predictions(Path(kept), min(COMPARED, len(tokens))),
        )
        measured = _measure_base(base, asked, tokenizer, min(LENGTH, limit or LENGTH))
        release_memory()
        if stored.is_wider(placement):
            in_files = stored.in_stored_dtype(partial(load_base, base), placement, tokens=tokens, task=task, who="base")
            measured = replace(measured, stored=in_files)
        return _measure_converted(converted, asked, measured, held_out.name, max_perplexity_increase)


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """What both models are asked. tokens: (sequences, length). predictions: those of the base, kept to be compared."""

    tokens: torch.Tensor
    task: Task
    placement: Placement
    predictions: Predictions


def _measure_converted(
    converted: Path, asked: _Questions, measured: "_Base", text: str, max_perplexity_increase: float | None
) -> Validation:
    """text: its name."""
    tokens, task, placement = asked.tokens, asked.task, asked.placement
    with load_converted(converted, placement, measured.unexpected) as loaded:
        after = perplexity(
            loaded.model, tokens, "perplexity of the converted model", observe=asked.predictions.compare, task=task
        )
        if not after.finite:
            raise GateRefused(
                "The converted model's perplexity is not finite, though the base model's is: try a recipe that shares "
                "less, or a wider --dtype."
            )
        few = stored.first(loaded.model, tokens, task, "converted") if measured.stored else None
        check, cache_after, copying = None, 0, None
        if (decoding := task.decoding(loaded.model, tokens[0, :DECODED])) is not None:
            check = decode_check(loaded.model, decoding.tokens, measured.rounding, decoding.source)
            cache_after = cache_bytes_per_token(
                loaded.model, decoding.tokens[:CACHED], placement.stored, decoding.source
            )
        if measured.copying is not None:
            lost, probes = measured.copying
            copied = copying_loss(loaded.model, probes, lost.distance, "copying, converted model")
            copying = CopyingReport(copied.distance, copied.tokens, lost.loss, copied.loss)
        del loaded
    release_memory()
    in_files = None
    if few and measured.few and measured.stored:
        load = partial(load_converted, converted, unexpected=measured.unexpected)
        again = stored.in_stored_dtype(load, placement, tokens=tokens, task=task, who="converted")
        in_files = stored.compared(placement, (measured.few, few), (measured.stored, again))
    before = measured.perplexity.perplexity
    report = PerplexityReport(
        text=text,
        tokens=after.tokens,
        before=before,
        after=after.perplexity,
        dtype=placement.dtype_name,
        task=task.name,
        stored=in_files,
    )
    gate = None
    if max_perplexity_increase is not None:
        decodes = check is None or check.passed
        gate = GateResult(max_perplexity_increase, report.increase <= max_perplexity_increase and decodes)
    return Validation(
        perplexity=report,
        decode_check=check,
        gate=gate,
        cache_bytes_per_token=Change(measured.cache, cache_after),
        copying=copying,
        agreement=asked.predictions.agreement,
    )


def refuse_if_failed(validation: Validation) -> None:
    """Raises GateRefused if the converted model decodes wrongly or its perplexity rises beyond the gate."""
    check = validation.decode_check
    if check is not None and not check.passed:
        problem = (
            f"logits differ by {check.max_abs_logit_difference:.2g} (tolerance {check.tolerance:.2g})"
            if not check.max_abs_logit_difference <= check.tolerance
            else "it generates other tokens"
        )
        raise GateRefused(
            f"The converted model decodes wrongly: with a cache {problem}. This is a fault of the conversion, "
            "not of the recipe; please report it with the model's config.json and the recipe."
        )
    if validation.gate is not None and not validation.gate.passed:
        increase, limit = validation.perplexity.increase, validation.gate.max_perplexity_increase
        enough = math.ceil(increase * 100)
        raise GateRefused(
            f"The gate refused: perplexity rises by {increase:.2%} (limit {limit * 100:.4g}%), from "
            f"{validation.perplexity.before:.2f} to {validation.perplexity.after:.2f}: try a recipe that shares "
            f"less, or --max-perplexity-increase {enough}%."
        )


@dataclass(frozen=True, kw_only=True)
class _Base:
    """What was measured of the base model. rounding: difference of logits in decoding. cache: bytes per token.

    unexpected: tensors in its files that it does not know. copying: with the probes, for the other model, too.
    few, stored: perplexity of the first sequences, as computed and in the dtype of the files; None if they are one.
    """

    perplexity: Perplexity
    rounding: float
    cache: int
    unexpected: frozenset[str]
    copying: tuple[CopyingLoss, torch.Tensor] | None
    few: Perplexity | None = None
    stored: Perplexity | None = None


def _measure_base(folder: Path, asked: _Questions, tokenizer: Any, probe_length: int) -> _Base:
    tokens, task, placement = asked.tokens, asked.task, asked.placement
    with load_base(folder, placement) as loaded:
        model = loaded.model
        refuse_foreign_tokens(folder, embedded_tokens(model), tokens, task.inserted)
        before = perplexity(model, tokens, "perplexity of the base model", observe=asked.predictions.keep, task=task)
        if not before.finite:
            raise GateRefused(
                f"{folder}: the base model's perplexity is not finite: its weights are damaged, or overflow in "
                f"{placement.dtype_name}: get the model anew, or give a wider --dtype."
            )
        rounding, cache, copying = 0.0, 0, None
        if (decoding := task.decoding(model, tokens[0, :DECODED])) is not None:
            rounding = rounding_difference(model, decoding.tokens, decoding.source)
            cache = cache_bytes_per_token(model, decoding.tokens[:CACHED], placement.stored, decoding.source)
        if task.copies:
            probes = Probes.of(tokenizer, embedded_tokens(model), probe_length)
            probe = probes.tokens(probes.period)
            copying = copying_loss(model, probe, probes.period, "copying, base model"), probe
        few = stored.first(model, tokens, task, "base") if stored.is_wider(placement) else None
        return _Base(
            perplexity=before,
            rounding=rounding,
            cache=cache,
            unexpected=loaded.unexpected,
            copying=copying,
            few=few,
        )
