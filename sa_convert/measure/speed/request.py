"""What is asked for, and whether two models can be compared by it."""

from collections.abc import Sequence
from dataclasses import dataclass

from sa_convert.domain.model import RunOptions
from sa_convert.domain.report import PredictionTask
from sa_convert.errors import CheckpointError, SaConvertError
from sa_convert.families.family import PREFIX
from sa_convert.models.auto_class import prediction_task
from sa_convert.models.placement import positions
from sa_convert.models.subject import Subject
from sa_convert.read.stock_folder import base_type_of

CONTEXTS = (128, 512, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RunOptions):
    """How two models are timed."""

    contexts: tuple[int, ...] | None = None
    """Tokens that are prefilled; None: those of CONTEXTS that the models have positions for."""

    batches: tuple[int, ...] = (1, 4)
    """Sequences at once."""

    steps: int = 32
    """Tokens decoded after each prefill."""

    repeats: int = 5
    """Turns that count."""

    warmup: int = 1
    """Turns before those."""

    threads: int | None = None
    """Of torch in each process; None: as many as torch takes."""

    attention: str | None = None
    """"eager" or "sdpa"; None: what transformers chooses."""

    static: bool = False
    """A static cache, of the size that is needed."""

    seed: int = 0
    """Of the tokens."""


def common_task(subjects: Sequence[Subject], options: BenchOptions) -> PredictionTask:
    """How both predict text. Raises CheckpointError for two that cannot be compared, DataError for one without a
    language-modelling head, SaConvertError for a cache that they do not have."""
    configs = [subject.config for subject in subjects]
    types = [base_type_of(subject.folder, subject.config).removeprefix(PREFIX) for subject in subjects]
    names = [subject.name for subject in subjects]
    if types[0] != types[1]:
        raise CheckpointError(
            f"{names[0]} is of type {types[0]} and {names[1]} of type {types[1]}, so they cannot be compared: give "
            "the model that was converted as --against."
        )
    tasks = [prediction_task(config, name) for config, name in zip(configs, names, strict=True)]
    if tasks[0] != tasks[1]:
        raise CheckpointError(
            f"{names[0]} does {tasks[0]} prediction and {names[1]} {tasks[1]} prediction, so they cannot be compared."
        )
    if options.static and tasks[0] != "next-token":
        raise SaConvertError(
            f"--cache static: {names[0]} does {tasks[0]} prediction, and bench knows a static cache of decoders only."
        )
    return tasks[0]


def contexts_of(options: BenchOptions, subjects: Sequence[Subject], steps: int) -> tuple[list[int], list[int]]:
    """The contexts to measure, and those of the default that the models have no positions for."""
    limits = [(limit, subject) for subject in subjects if (limit := positions(subject.config)) is not None]
    if options.contexts is not None:
        for limit, subject in limits:
            check_context(max(options.contexts), steps, limit, subject.name)
        return list(options.contexts), []
    limit, subject = min(limits, key=lambda item: item[0], default=(max(CONTEXTS) + steps, subjects[0]))
    contexts = [context for context in CONTEXTS if context + steps <= limit]
    if not contexts:
        check_context(CONTEXTS[0], steps, limit, subject.name)
    return contexts, [context for context in CONTEXTS if context not in contexts]


def check_context(context: int, steps: int, limit: int, name: str) -> None:
    if context + steps > limit:
        decoded = f" and {steps} new tokens" if steps else ""
        raise SaConvertError(
            f"{name}: a context of {context}{decoded} is more than the model's {limit} positions: give smaller "
            f"--contexts{' or --new-tokens' if steps else ''}."
        )
