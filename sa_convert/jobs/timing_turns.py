"""What `sa-convert bench --turns` does: a conversation timed, with the cache that was kept and without."""

from contextlib import ExitStack
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
from sa_convert.output.disk_space import require_space
from sa_convert.output.signals import termination_as_exit
from sa_convert.output.staging import staging
from sa_convert.plan.audited import foreign_code
from sa_convert.present.files.report_file import installed_versions
from sa_convert.present.files.turns_folder import write_turns

CONTEXT = 4096
"""Tokens of the whole conversation, or as many as the models have positions for."""

_OUTPUT_ROOM = 16_000_000
"""Bytes of disk for the files that are written."""

_LARGEST_CACHE = 2_000_000_000
"""Bytes of disk for a session."""


def time_turns(
    model: str, against: str | None, turns: int, options: BenchOptions, output: Path | None = None
) -> TurnsBenchmark:
    """Time a conversation of so many turns with each of the models, one after the other.

    options: the first of its contexts is that of the whole conversation; `steps` are the tokens of an answer. output:
    a folder to make, with the table and the figure. Raises CheckpointError, DataError (a model that does not continue
    text), OutputError, and SaConvertError for a conversation that has no room.
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
        require_space(temporary, _LARGEST_CACHE, "Sessions", "fewer --contexts")

        # 2. The models, as safetensors; nothing is loaded yet.
        subjects = [
            open_subject(reference, temporary / f"model{number}", options, foreign_code)
            for number, reference in enumerate([model] if against is None else [model, against])
        ]

        # 3. How long the messages are, and whether the models can read them.
        context, message = _lengths(subjects, turns, options)

        # 4. Each model's conversation.
        results = []
        conditions = None
        for subject in subjects:
            timed, conditions = _timed(subject, temporary, (turns, message, context), options)
            results.append(timed)

        # 5. What was measured.
        assert conditions is not None
        benchmark = TurnsBenchmark(tuple(results), conditions, installed_versions())
        if stage is not None:
            write_turns(benchmark, stage.folder)
            stage.publish()
    return benchmark


def _lengths(subjects: list[Subject], turns: int, options: BenchOptions) -> tuple[int, int]:
    """Tokens of the conversation, and of each message of the user."""
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
    message = context // turns - options.steps
    if message < 1:
        raise SaConvertError(
            f"{turns} turns of a conversation of {context} tokens have {context // turns} tokens each, in which "
            f"answers of {options.steps} leave no room: give fewer --turns or --new-tokens, or larger --contexts."
        )
    return context, message


def _timed(
    subject: Subject, temporary: Path, lengths: tuple[int, int, int], options: BenchOptions
) -> tuple[TimedConversation, TurnConditions]:
    import torch

    from sa_convert.jobs.benchmarking import processor
    from sa_convert.measure.speed.conversation_timer import ConversationTimer
    from sa_convert.models.load import embedded_tokens

    turns, message, context = lengths
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    placement = place(subject.folder, options.device, options.dtype)
    with subject.load(placement) as loaded:
        generator = torch.Generator().manual_seed(options.seed)
        said = torch.randint(embedded_tokens(loaded.model), (turns, message), generator=generator)
        with progress(turns * (options.repeats + 1), f"turns of {subject.name}", "run") as bar:
            timer = ConversationTimer(loaded.model, said, options.steps, bar.update)
            times = timer.turns(temporary / "session", options.repeats)
        (temporary / "session").unlink()
        conditions = TurnConditions(
            device=placement.device,
            dtype=placement.dtype_name,
            threads=torch.get_num_threads(),
            processor=processor(),
            context=context,
            new_tokens=options.steps,
            repeats=options.repeats,
            seed=options.seed,
        )
    return TimedConversation(subject.name, times), conditions
