"""What `sa-convert evaluate` does: one model, or two on the same tokens, never both in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sa_convert.console.progress import tell
from sa_convert.domain.evaluation import CopyingLoss, Evaluation, ModelQuality
from sa_convert.domain.model import RunOptions
from sa_convert.errors import CheckpointError, DataError, SaConvertError
from sa_convert.measure.quality import copying, long_questions
from sa_convert.measure.quality.decode import decode_check, rounding_without_cache
from sa_convert.measure.quality.divergence import Comparison, KeptLogits
from sa_convert.measure.quality.gate import KINDS, LENGTH, SEQUENCES
from sa_convert.measure.quality.long_questions import LongQuestions
from sa_convert.measure.quality.perplexity import perplexity
from sa_convert.measure.quality.questions import decoded
from sa_convert.measure.quality.walk import in_one_piece, walk
from sa_convert.models.load import embedded_tokens, refuse_foreign_tokens, release_memory
from sa_convert.models.placement import most_positions, placed, positions, usable_positions
from sa_convert.models.products import plain_products, precise_products
from sa_convert.models.quiet import keep_module_cache_clean
from sa_convert.models.subject import Subject, open_subject
from sa_convert.models.task import Task, task_of
from sa_convert.models.tokens import long_sequences, token_sequences
from sa_convert.output.signals import termination_as_exit
from sa_convert.plan.audited import foreign_code
from sa_convert.plan.converted import converted_parts
from sa_convert.plan.savings import longest_window
from sa_convert.read.open_model import open_model
from sa_convert.texts.text import Text


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """How to evaluate."""

    sequences: int = SEQUENCES
    """Of the text."""

    length: int | None = None
    """Tokens of a sequence; None: LENGTH, or as many as both models have positions for."""

    long: int | None = None
    """Tokens of a long text; 0: none is measured; None: long_questions.LENGTH, or as many as both models have positions
    for, and none if that is not more than LENGTH."""

    seed: int = 0
    """Of the copying probes."""


def evaluate(model: str, against: str | None, text: Text, options: EvaluateOptions | None = None) -> Evaluation:
    """Measure `model`, and `against` if it is given, on the validation part of `text`, copying probes and needles.

    model, against: folders, ordinary or converted, .gguf files, or models on the Hub. Converted models run by the code
    in their folders. What they predict is what `sa_convert.models.task.task_of` says: the next token, masked ones, or
    spans; long context and copying are for the first, the decode check for models with a cache.

    Raises DataError (no language-modelling head, no tokenizer, text too short), CheckpointError (a model that cannot be
    loaded, two that cannot be compared), OutputError (no room for temporary files), and SaConvertError if a perplexity
    is not finite or `length` is more than a model has positions.
    """
    options = options or EvaluateOptions()
    keep_module_cache_clean()
    with termination_as_exit(), TemporaryDirectory(prefix="sa-convert-evaluate-") as temporary:
        # 1. Both models, as safetensors; nothing is loaded yet.
        references = [model] if against is None else [model, against]
        subjects = [
            open_subject(reference, Path(temporary) / f"model{number}", options, foreign_code)
            for number, reference in enumerate(references)
        ]

        # 2. The same tokens for both.
        held_out = text.split("validation", KINDS)
        asked = _asked(subjects, held_out, options)

        # 3. The other model, whose logits wait on the disk; then the model. Never are both in memory.
        other = agreement = None
        if against is None:
            quality = asked.measure(subjects[0])
        else:
            folder = Path(temporary) / "logits"
            folder.mkdir()
            kept = KeptLogits(folder, len(asked.tokens))
            other = asked.measure(subjects[1], kept.keep)
            release_memory()
            comparison = Comparison(kept)
            quality = asked.measure(subjects[0], comparison.add)
            agreement = comparison.agreement

    # 4. What was measured.
    return Evaluation(
        text=held_out.name,
        task=asked.task.name,
        tokens=asked.task.count(asked.task.scored(asked.tokens)),
        sequences=asked.tokens.shape[0],
        length=asked.tokens.shape[1],
        seed=options.seed,
        probes=copying.PROBES if asked.task.copies else 0,
        probe_length=asked.probe_length,
        model=quality,
        against=other,
        agreement=agreement,
    )


def _asked(subjects: list[Subject], text: Text, options: EvaluateOptions) -> "_Asked":
    """Raises CheckpointError if two models cannot be asked the same."""
    subject, *others = subjects
    tokenizer = subject.tokenizer()
    task = task_of(subject.config, tokenizer, subject.name)
    tokens = token_sequences(tokenizer, text, options.sequences, _length(options.length, subjects), task.frame)
    for other in others:
        other_tokenizer = other.tokenizer()
        other_task = task_of(other.config, other_tokenizer, other.name)
        if task.name != other_task.name:
            raise CheckpointError(
                f"{subject.name} does {task.name} prediction and {other.name} {other_task.name} prediction, so they "
                "cannot be compared: evaluate them one at a time, without --against."
            )
        other_tokens = token_sequences(other_tokenizer, text, len(tokens), tokens.shape[1], other_task.frame)
        if task != other_task or not tokens.equal(other_tokens):
            raise CheckpointError(
                f"The tokenizers of {subject.name} and {other.name} make different tokens of the same text, so the "
                "models cannot be compared: evaluate them one at a time, without --against."
            )
    probe_length = min([copying.LENGTH, *_limits(subjects)])
    return _Asked(
        tokenizer=tokenizer,
        tokens=tokens,
        task=task,
        probe_length=probe_length,
        long=_long_questions(subjects, tokenizer, text, options) if task.copies else None,
        options=options,
    )


def _long_questions(
    subjects: list[Subject], tokenizer: Any, text: Text, options: EvaluateOptions
) -> LongQuestions | None:
    """None if nothing is to be asked. Raises SaConvertError and DataError for a length that was asked for and cannot
    be: more than a model has positions, or than the text has tokens."""
    length = options.long
    if length is None:
        length = min([long_questions.LENGTH, *_limits(subjects)])
        if length <= LENGTH:
            return None
    elif length == 0:
        return None
    for subject in subjects:
        _check_length(length, most_positions(subject.config), "--long")
    texts = long_sequences(tokenizer, text, long_questions.SEQUENCES, length)
    if texts is not None:
        return LongQuestions(tokenizer, texts, options.seed)
    too_short = f"Text {text.name}: it has fewer than {length} tokens"
    if options.long is not None:
        raise DataError(f"{too_short}, which --long {length} needs: give a longer text, or fewer tokens.")
    tell(f"{too_short}, so nothing is measured of long text.")
    return None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What every model is asked. tokens: (sequences, length). probe_length: tokens of a copying probe. long: None if
    nothing is asked about long context."""

    tokenizer: Any
    tokens: torch.Tensor
    task: Task
    probe_length: int
    long: LongQuestions | None
    options: EvaluateOptions

    def measure(self, subject: Subject, observe: Callable[[torch.Tensor], None] = lambda logits: None) -> ModelQuality:
        """observe: called with the scored logits of each sequence of the text."""
        placement = placed(subject.folder, self.options)
        with precise_products(placement.device), subject.load(placement) as loaded:
            model = loaded.model
            refuse_foreign_tokens(subject.folder, embedded_tokens(model), self.tokens, self.task.inserted)
            _check_length(self.tokens.shape[1], usable_positions(model))
            measured = perplexity(model, self.tokens, f"perplexity of {subject.name}", observe=observe, task=self.task)
            if not measured.finite:
                raise SaConvertError(
                    f"{subject.name}: the perplexity is not finite: its weights are damaged, or overflow in "
                    f"{placement.dtype_name}: get the model anew, or give a wider --dtype."
                )
            check, period, far = None, 0, None
            losses: tuple[CopyingLoss, ...] = ()
            window, pieces_of = _window(subject)
            decoding = decoded(self.task, model, self.tokens, window, positions(subject.config))
            if decoding is not None:
                pieces = None if window is None else pieces_of(len(decoding.tokens), window)
                with plain_products():
                    rounding = rounding_without_cache(model, decoding.tokens, decoding.source)
                    check = decode_check(model, decoding.tokens, rounding, decoding.source, pieces)
            if self.task.copies:
                probes = copying.Probes.of(self.tokenizer, embedded_tokens(model), self.probe_length, self.options.seed)
                losses, period = probes.losses(model), probes.period
            if self.long is not None:
                _check_length(self.long.length, usable_positions(model), "--long")
                losses, far = self.long.copying(model, losses), self.long.ask(model, f" of {subject.name}")
        return ModelQuality(
            name=subject.name,
            dtype=placement.dtype_name,
            loss=measured.loss,
            perplexity=measured.perplexity,
            decode_check=check,
            copying=losses,
            period=period,
            long=far,
        )


def _window(subject: Subject) -> tuple[int | None, Callable[[int, int], tuple[int, ...]]]:
    """The most tokens that a KV group with a window caches, or None; and in which pieces to give a sequence to the
    model: some with recurrent layers take only single tokens once their cache has been filled."""
    if not subject.converted:
        return None, walk
    model, plan = converted_parts(open_model(str(subject.folder)))
    steps_only = any(layer.heads == 0 for layer in model.geometry.layers)
    return longest_window(model, plan), in_one_piece if steps_only else walk


def _length(asked: int | None, subjects: list[Subject]) -> int:
    """Tokens of a sequence. Raises SaConvertError for more than a model has positions."""
    if asked is None:
        return min([LENGTH, *_limits(subjects)])
    for subject in subjects:
        _check_length(asked, most_positions(subject.config))
    return asked


def _check_length(length: int, limit: int | None, option: str = "--length") -> None:
    if limit is not None and length > limit:
        raise SaConvertError(f"{option} {length} is more than the {limit} positions of the model: give that or less.")


def _limits(subjects: list[Subject]) -> list[int]:
    return [limit for subject in subjects if (limit := positions(subject.config)) is not None]
