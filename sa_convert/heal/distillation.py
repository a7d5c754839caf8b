"""Heals a converted model: it is trained a little to predict what its base predicts, and judged on held-out text.

As the refit, it changes weights only if that helps on held-out text and held-out repetition alike.
"""

import math
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sa_convert.console.progress import announce
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.heal_settings import BOTH, REPEATED, HealSettings
from sa_convert.domain.healed import HealReport
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.plan import Plan
from sa_convert.errors import CheckpointError, DataError
from sa_convert.heal.budget_clock import Clock, time_left
from sa_convert.heal.distilled import Distilled, Teacher, head_of
from sa_convert.heal.healing_state import HealingState, fingerprint
from sa_convert.heal.healing_text import HealingText, healing_text
from sa_convert.heal.healing_trainer import ENDLESS, HealingTrainer, Judging, arguments, steps_of
from sa_convert.heal.healing_verdict import worse
from sa_convert.heal.judge import Judge
from sa_convert.heal.trained import prepare, trained_tensors
from sa_convert.models.auto_class import prediction_task
from sa_convert.models.load import embedded_tokens, load_base, load_converted, load_tokenizer
from sa_convert.models.placement import Placement, placed
from sa_convert.models.processes import from_first
from sa_convert.models.products import fast_products
from sa_convert.models.quiet import quiet
from sa_convert.observe.written import written_by

KEPT_BYTES = 2 << 30
"""Of the teacher's answers that are kept on the disk, at the most."""

FEW = 64
"""Tokens on which the heads of both models are compared."""

WRITTEN_TOKENS, WRITTEN_PART = 65_536, 8
"""Tokens that the base writes, if its own text is asked for: so many, or one of so many that are trained on; never
more than are trained on."""


WRITING_PART = 4
"""Writing takes no more than one of so many minutes, if these are the budget."""


@dataclass(frozen=True)
class Healed:
    """tensors: those that differ now, by name, in the dtype of the files; empty if nothing was kept."""

    tensors: Mapping[str, torch.Tensor]
    report: HealReport


@dataclass(frozen=True, kw_only=True)
class HealingTask:
    """What is healed, by whom, and how."""

    converted: Model
    plan: Plan
    base: Checkpoint
    settings: HealSettings
    """Resolved."""

    run: RunOptions
    state: Path
    """The folder for what is kept while it runs."""

    resume: bool = False
    accumulate: int = 1
    """Parts in which the rows of a step go through a process."""


def heal(task: HealingTask) -> Healed:
    """Train, judge, and give what was kept. Every process of a launch has to call it.

    Raises CheckpointError (a model that cannot be loaded or trained), DataError (text, no next-token prediction),
    OutputError (an interrupted run that should go on, or should not).
    """
    converted, base, settings = task.converted.checkpoint, task.base, task.settings
    if prediction_task(converted.config, converted.identity) != "next-token":
        raise DataError(f"{converted.identity}: only models that predict the next token can be healed.")
    names = trained_tensors(task.converted, base, task.plan, settings)
    begun = {
        "weights": fingerprint(converted),
        "weights of the base": fingerprint(base),
        "settings": settings.model_dump(),
        "accumulation": task.accumulate,
    }
    state = HealingState.open(task.state, begun, task.resume)
    placement = _placement(converted.folder, task.run)
    device = torch.device(placement.device)
    tokenizer = load_tokenizer(converted.folder, True, "")
    with ExitStack() as models:
        models.enter_context(fast_products())
        teacher = models.enter_context(load_base(base.folder, placement, base.trusted)).model.requires_grad_(False)
        student = models.enter_context(load_converted(converted.folder, placement, None)).model
        written, writing = _written(teacher, tokenizer, settings, state)
        text = healing_text(tokenizer, embedded_tokens(student), settings, written)
        few = next(iter(text.held_out.text.values()))[:1, :FEW].to(device)
        head = head_of(student, teacher, few)
        kept = _kept_file(task, text, teacher, head is None)
        answers = Teacher(teacher, head is not None, len(text.rows), kept)
        announce("measuring the base")
        judge = Judge(text.held_out, answers, device)
        if state.base is None:
            own = head_of(teacher, teacher, few) if head is not None else None
            state.base = judge.judge(Distilled(teacher, own, False), 0)
        trained = prepare(student, converted, names, settings)
        parameters = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
        clock = Clock(steps_of(settings), time_left(settings.minutes, writing), state.seconds)
        announce(f"healing: {parameters:,} parameters train on {text.name}")
        with quiet():
            half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(placement.dtype)
            args = arguments(settings, task.state, cpu=device.type == "cpu", half=half, accumulate=task.accumulate)
            judging = Judging(state, judge, settings, clock)
            distilled = Distilled(student, head, settings.gradient_checkpointing)
            trainer = HealingTrainer(distilled, answers, text, clock, args)
            judging.trainer = trainer
            trainer.add_callback(judging)
            checkpoint = state.checkpoint if task.resume else None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    curve = [judged for _, judged in state.curve]
    tensors = trained.changed(state.best_state()) if state.best is not None and args.process_index == 0 else {}
    report = HealReport(
        settings=settings.model_dump(exclude_defaults=True),
        text=text.name,
        tensors=len(trained.tensors),
        parameters=parameters,
        base=state.base,
        curve=tuple(curve),
        kept=state.best,
        seconds=clock.seconds + writing,
        dtype=placement.dtype_name,
        processes=args.world_size,
        refused=() if state.best is not None else worse(curve[-1], curve[0], state.base),
    )
    return Healed(tensors, report)


def _placement(folder: Path, run: RunOptions) -> Placement:
    """Where this process trains. Raises CheckpointError if the model does not fit there."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        run = replace(run, device="cpu")
    placement = placed(folder, run)
    if placement.max_memory is not None:
        raise CheckpointError(
            f"{folder}: the model does not fit into memory, and healing needs two of them there: use a device with "
            "more, or a narrower --dtype."
        )
    if placement.device == "cuda" and (rank := os.environ.get("LOCAL_RANK")):
        return replace(placement, device=f"cuda:{rank}")
    return placement


def _written(
    teacher: Any, tokenizer: Any, settings: HealSettings, state: HealingState
) -> tuple[torch.Tensor | None, float]:
    """Rows that the base writes, if its own text is asked for, and the seconds that it took: in the first process,
    since rounding of another device makes other text."""
    if settings.text not in ("written", BOTH):
        return None, 0.0
    assert settings.length is not None
    budget = settings.tokens or WRITTEN_TOKENS
    rows = max(2, max(min(WRITTEN_TOKENS, budget), budget // WRITTEN_PART) // settings.length)
    seconds = 60 * settings.minutes / WRITING_PART if settings.minutes else math.inf
    write = partial(written_by, teacher, tokenizer, rows, settings.length, settings.seed, seconds)
    return from_first(partial(state.written, write))


def _kept_file(task: HealingTask, text: HealingText, teacher: Any, whole: bool) -> Path | None:
    """Where the teacher's answers to the rows of a text wait for the next time; None: there is none, or no room."""
    vocabulary, hidden = teacher.get_output_embeddings().weight.shape
    size = text.rows.numel() * (vocabulary if whole else hidden) * teacher.dtype.itemsize
    steps = steps_of(task.settings)
    asked = (steps or ENDLESS) * task.settings.step_rows * (REPEATED - 1) // REPEATED
    if asked <= len(text.rows) or size > KEPT_BYTES or shutil.disk_usage(task.state).free < 2 * size:
        return None
    return task.state / f"teacher-{os.environ.get('RANK', '0')}.bin"
