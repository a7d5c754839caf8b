"""What `sa-convert bench --turns` does: a conversation timed, with the cache that was kept and without."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from sa_convert.console.progress import progress
from sa_convert.domain.turn_times import TimedConversation, TurnConditions, TurnsBenchmark
from sa_convert.errors import DataError, OutputError, SaConvertError
from sa_convert.measure.speed.request import BenchOptions, check_context
from sa_convert.models.auto_class import prediction_task
from sa_convert.models.placement import place, positions
from sa_convert.models.quiet import keep_module_cache_clean
from sa_convert.models.subject import Subject, open_subject
from sa_convert.output.signals import termination_as_exit
from sa_convert.output.staging import staging
from sa_convert.plan.audited import foreign_code
from sa_convert.present.files.report_file import installed_versions
from sa_convert.present.files.turns_folder import write_turns

CONTEXT = 4096
"""Tokens of the whole conversation, or as many as the models have positions for."""

_OUTPUT_ROOM = 16_000_000
"""Bytes of disk for the files that are written."""


@dataclass(frozen=True)
class Lengths:
    """turns: of the conversation. message: tokens of each of the user's. context: tokens of all, 0: the default."""

    turns: int
    message: int
    context: int = 0

    @property
    def answer(self) -> int:
        return self.context // self.turns - self.message


def time_turns(
    model: str, against: str | None, lengths: Lengths, options: BenchOptions, output: Path | None = None
) -> TurnsBenchmark:
    """Time a conversation with each of the models, one after the other.

    options: the largest of its contexts is that of the whole conversation; `steps` are the tokens of an answer that the
    model says itself. output: a folder to make, with the table and the figure. Raises CheckpointError, DataError (a
    model that does not continue text), OutputError (the output exists, or the disk has no room for the sessions), and
    SaConvertError for a conversation that has no room.
    """
    keep_module_cache_clean()
    with ExitStack() as stack:
        # 1. A folder beside the output, which becomes it at the end, and one for the sessions.
        stack.enter_context(termination_as_exit())
        temporary = Path(stack.enter_context(TemporaryDirectory(prefix="sa-convert-bench-")))
        stage = None
        if output is not None:
            if output.exists():
                raise OutputError(f"{output}: exists already; use another -o.")
            stage = stack.enter_context(staging(output, False, _OUTPUT_ROOM))

        # 2. The models, as safetensors; nothing is loaded yet.
        subjects = [
            open_subject(reference, temporary / f"model{number}", options, foreign_code)
            for number, reference in enumerate([model] if against is None else [model, against])
        ]

        # 3. How long the messages are, and whether the models can read them.
        lengths = _possible(subjects, lengths, options)

        # 4. Each model's conversation.
        results = []
        conditions = None
        for subject in subjects:
            timed, conditions = _timed(subject, temporary, lengths, options)
            results.append(timed)

        # 5. What was measured.
        assert conditions is not None
        benchmark = TurnsBenchmark(tuple(results), conditions, installed_versions())
        if stage is not None:
            write_turns(benchmark, stage.folder)
            stage.publish()
    return benchmark


def _possible(subjects: list[Subject], lengths: Lengths, options: BenchOptions) -> Lengths:
    """With the tokens of the conversation. Raises SaConvertError if there is no room for the answers."""
    limits = [(limit, subject) for subject in subjects if (limit := positions(subject.config)) is not None]
    for subject in subjects:
        if prediction_task(subject.config, subject.name) != "next-token":
            raise DataError(f"{subject.name}: does not continue a text, so there are no turns to time.")
    if options.contexts is None:
        context = min([CONTEXT, *(limit for limit, _ in limits)])
    else:
        context = max(options.contexts)
        for limit, subject in limits:
            check_context(context, 0, limit, subject.name)
    found = replace(lengths, context=context)
    if found.answer < options.steps:
        raise SaConvertError(
            f"{found.turns} turns of a conversation of {context} tokens have {context // found.turns} tokens each, in "
            f"which messages of {found.message} and answers of {options.steps} have no room: give fewer --turns, a "
            "shorter --message, fewer --new-tokens or larger --contexts."
        )
    return found


def _timed(
    subject: Subject, temporary: Path, lengths: Lengths, options: BenchOptions
) -> tuple[TimedConversation, TurnConditions]:
    import torch

    from sa_convert.jobs.benchmarking import processor
    from sa_convert.measure.speed.conversation_timer import ConversationTimer
    from sa_convert.models.load import embedded_tokens

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    placement = place(subject.folder, options.device, options.dtype)
    with subject.load(placement) as loaded:
        generator = torch.Generator().manual_seed(options.seed)
        shapes = (lengths.turns, lengths.message), (lengths.turns, lengths.answer - options.steps)
        said, more = (torch.randint(embedded_tokens(loaded.model), shape, generator=generator) for shape in shapes)
        with progress(lengths.turns * (options.repeats + 1), f"turns of {subject.name}", "run") as bar:
            timer = ConversationTimer(loaded.model, said, more, options.steps, bar.update)
            times = timer.turns(temporary / "session", options.repeats)
        (temporary / "session").unlink()
        conditions = TurnConditions(
            device=placement.device,
            dtype=placement.dtype_name,
            threads=torch.get_num_threads(),
            processor=processor(),
            context=lengths.context,
            new_tokens=options.steps,
            repeats=options.repeats,
            seed=options.seed,
        )
    return TimedConversation(subject.name, times), conditions
