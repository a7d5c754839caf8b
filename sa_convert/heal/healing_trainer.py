"""transformers' Trainer, told how healing goes: rows in their order, the teacher's states, the clock, the judge."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sa_convert.console.progress import progress
from sa_convert.domain.heal_settings import HealSettings
from sa_convert.errors import SaConvertError
from sa_convert.heal.budget_clock import Clock
from sa_convert.heal.distilled import Distilled, Teacher
from sa_convert.heal.healing_state import HealingState
from sa_convert.heal.healing_text import HealingText
from sa_convert.heal.healing_verdict import score, worse
from sa_convert.heal.judge import Judge
from sa_convert.heal.trained import trained_state

ENDLESS = 1_000_000
"""Steps of a run that only time ends."""


def arguments(
    settings: HealSettings, folder: Path, *, cpu: bool, half: str | None, accumulate: int
) -> TrainingArguments:
    """How the Trainer trains. folder: of its checkpoints. half: "bf16" or "fp16", or None for float32.

    accumulate: parts in which the rows of a step go through a process. Raises SaConvertError if the rows of a step
    cannot be spread so.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.step_rows % (processes * accumulate):
        raise SaConvertError(
            f"{settings.step_rows} rows cannot be spread over {processes} processes in {accumulate} parts each: give "
            f"--rows {processes * accumulate}, or a multiple of that."
        )
    told: dict[str, Any] = {half: True} if half else {}
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.step_rows // (processes * accumulate),
        gradient_accumulation_steps=accumulate,
        max_steps=steps_of(settings) or ENDLESS,
        learning_rate=settings.peak_rate,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=settings.seed,
        use_cpu=cpu,
        save_strategy="no",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=settings.train in ("layers", "model"),
        **told,
    )
    made._n_gpu = min(1, made.n_gpu)  # one process trains on one device; several are accelerate's
    return made


def steps_of(settings: HealSettings) -> int | None:
    """Of the whole run; None: only time ends it."""
    assert settings.length is not None
    per_step = settings.step_rows * settings.length
    return None if settings.tokens is None else max(1, -(-settings.tokens // per_step))


def judgements(settings: HealSettings) -> int:
    """In one run, evenly over the budget. One costs about as much as training on 2,000 tokens, so a short run has few
    of them; a long run has more, since what came after the last one is lost if it is interrupted."""
    if settings.tokens is None:
        return max(8, min(40, round((settings.minutes or 0) / 4)))
    return max(2, min(8, settings.tokens // 16_384), min(40, settings.tokens // 100_000))


class HealingTrainer(Trainer):
    """model: the student. Everything else in healing is told by `Judging`."""

    def __init__(
        self, model: Distilled, teacher: Teacher, text: HealingText, clock: Clock, args: TrainingArguments
    ) -> None:
        rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.rows = text.training(rows, args.seed)
        self.distilled = model
        super().__init__(model=model, args=args, train_dataset=self.rows)
        self.teacher, self.clock = teacher, clock
        self.losses: list[torch.Tensor] = []
        """Of the batches since the last judgement."""
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.rows)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        wanted = self.teacher(inputs["tokens"], inputs["row"])
        found = model(tokens=inputs["tokens"], scored=inputs["scored"], wanted=wanted)
        self.losses.append(found["loss"].detach())
        return (found["loss"], found) if return_outputs else found["loss"]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        told = optimizer if optimizer is not None else self.optimizer
        assert told is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(told, self.clock.rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """That a checkpoint lacks what does not train is no news."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only what trains; the rest is in the student's folder."""
        if not self.args.should_save:
            return
        from safetensors.torch import save_file

        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trains = {name for name, parameter in self.distilled.named_parameters() if parameter.requires_grad}
        whole = self.distilled.state_dict() if state_dict is None else state_dict
        save_file({name: whole[name].contiguous() for name in trains}, folder / "model.safetensors")


class Judging(TrainerCallback):
    """Judges every so often, keeps the best state, and ends the run when its budget is used."""

    def __init__(self, state: HealingState, judge: Judge, settings: HealSettings, clock: Clock) -> None:
        assert settings.length is not None
        self.state, self.judge, self.clock = state, judge, clock
        self.step_tokens = settings.step_rows * settings.length
        self.judgements = judgements(settings)
        self.trainer: HealingTrainer | None = None
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The first judgement is that of the model as it was."""
        self._bar = progress(1000, "healing", unit="", bar_format="{desc} {percentage:3.0f}%|{bar}|{postfix}")
        self.clock.note(args.device)
        self.state.forget_after(state.global_step)
        if not self.state.curve:
            self._judge(args, 0)
        self._show(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.clock.note(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        used = self.clock.used(state.global_step)
        if used * self.judgements >= len(self.state.curve) or used >= 1:
            self._judge(args, state.global_step)
            control.should_save = True
        control.should_training_stop = control.should_training_stop or used >= 1
        self._show(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._bar.close()

    def _judge(self, args: Any, step: int) -> None:
        assert self.trainer is not None
        losses, self.trainer.losses = self.trainer.losses, []
        training = float(_over_processes(torch.stack(losses).mean())) if losses else None
        model = self.trainer.model
        found = self.judge.judge(model, step * self.step_tokens, training)
        kept, base = self.state, self.state.base
        assert base is not None
        kept.curve.append((step, found))
        before, best = kept.curve[0][1], kept.best
        good = step > 0 and not worse(found, before, base)
        if good and (best is None or score(found, base) < score(kept.curve[best][1], base)):
            state = trained_state(model)
            if args.process_index == 0:
                kept.keep_best(state)
            kept.best = len(kept.curve) - 1
        if args.process_index == 0:
            kept.save(self.clock.seconds)

    def _show(self, step: int) -> None:
        assert self.trainer is not None
        used = self.clock.used(step)
        loss = f"loss {float(self.trainer.losses[-1]):.3f}, " if self.trainer.losses else ""
        spent = self.clock.seconds - self.clock.earlier
        left = f", {_clock_time(spent / used * (1 - used))} left" if used and not self.clock.earlier else ""
        judged = self.state.curve[-1][1]
        shown = f"{loss}held out {judged.mean_divergence:.4f}, copying {judged.mean_copying:.3f}{left}"
        self._bar.set_postfix_str(f"{step * self.step_tokens:,} tokens, {shown}", refresh=False)
        self._bar.update(round(1000 * used) - self._bar.n)


def _over_processes(mean: torch.Tensor) -> torch.Tensor:
    """The mean over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
