"""What `sa-convert bench` does: two models timed side by side, each in a process of its own."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sa_convert.console.progress import announce, progress
from sa_convert.domain.benchmark import BenchedModel, Benchmark, Conditions, Pairing, Speed
from sa_convert.errors import CheckpointError, OutputError
from sa_convert.measure.speed.expected_work import Attention, attention_layers, prefill_flops, step_bytes
from sa_convert.measure.speed.parameters_read import Weights
from sa_convert.measure.speed.process import Worker, workers
from sa_convert.measure.speed.request import BenchOptions, check_context, common_task, contexts_of
from sa_convert.measure.speed.turns import Turns, block_sizes, take_turns
from sa_convert.models.quiet import keep_module_cache_clean
from sa_convert.models.subject import Subject, open_subject
from sa_convert.output.signals import termination_as_exit
from sa_convert.output.staging import staging
from sa_convert.plan.audited import foreign_code
from sa_convert.present.files.benchmark_folder import write_benchmark
from sa_convert.present.files.report_file import installed_versions
from sa_convert.read.open_model import open_model

_OUTPUT_ROOM = 16_000_000
"""Bytes of disk for the files that are written."""


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """A model in its process. answer: how that describes it."""

    worker: Worker
    subject: Subject
    answer: dict[str, Any]
    weights: Weights
    layers: tuple[Attention, ...] | None

    def speed(self, run: Turns, context: int, batch: int) -> Speed:
        itemsize = self.answer["itemsize"]
        return Speed(
            prefill=run.prefill,
            step=run.step,
            cache_bytes=run.cache_bytes,
            peak_memory=run.peak_memory,
            prefill_flops=prefill_flops(self.weights, self.layers, context, batch),
            step_bytes=step_bytes(
                self.weights, self.layers, cache=run.cache_bytes, context=context, batch=batch, itemsize=itemsize
            ),
        )

    def described(self) -> BenchedModel:
        answer = self.answer
        return BenchedModel(self.subject.name, answer["parameters"], answer["weight_bytes"], answer["attention"])


def bench(model: str, against: str, options: BenchOptions | None = None, output: Path | None = None) -> Benchmark:
    """Time `model` and `against` in turns; both are in memory, each in its own process, and one computes at a time.

    model, against: folders, ordinary or converted, .gguf files, or models on the Hub, of one family and vocabulary.
    Converted models run by the code in their folders. output: a folder to make, with the tables and the figure.

    Raises CheckpointError (a model that cannot be loaded, two that cannot be compared), DataError (no
    language-modelling head), OutputError, and SaConvertError for contexts beyond a model's positions, and if memory
    does not suffice.
    """
    options = options or BenchOptions()
    keep_module_cache_clean()
    with ExitStack() as stack:
        # 1. A folder beside the output, which becomes it at the end.
        stack.enter_context(termination_as_exit())
        temporary = Path(stack.enter_context(TemporaryDirectory(prefix="sa-convert-bench-")))
        stage = None
        if output is not None:
            if output.exists():
                raise OutputError(f"{output}: exists already; use another -o.")
            stage = stack.enter_context(staging(output, False, _OUTPUT_ROOM))

        # 2. Both models, as safetensors; nothing is loaded yet.
        subjects = [
            open_subject(reference, temporary / f"model{number}", options, foreign_code)
            for number, reference in enumerate((model, against))
        ]

        # 3. Whether they can be compared, and at which contexts.
        task = common_task(subjects, options)
        steps = options.steps if task != "masked-token" else 0
        contexts, skipped = contexts_of(options, subjects, steps)

        # 4. Each in a process of its own, in turns.
        with workers([subject.name for subject in subjects]) as pair:
            announce("loading both models")
            mine, theirs = _load(pair, subjects, options)
            for timed in (mine, theirs):  # some have fewer positions than their config names, which is known only now
                if (limit := timed.answer["positions"]) is not None:
                    check_context(max(contexts), steps, limit, timed.subject.name)
            pairings = _take_turns(mine, theirs, contexts, replace(options, steps=steps))

        # 5. What was measured, and under which conditions.
        benchmark = _benchmark(mine, theirs, pairings, skipped, replace(options, steps=steps))
        if stage is not None:
            write_benchmark(benchmark, stage.folder)
            stage.publish()
    return benchmark


def _take_turns(mine: _Timed, theirs: _Timed, contexts: Sequence[int], options: BenchOptions) -> list[Pairing]:
    pairings, pair = [], (mine.worker, theirs.worker)
    cases = [(context, batch) for context in contexts for batch in options.batches]
    with progress(len(cases) * (options.warmup + options.repeats), "timing", "turn") as bar:
        for context, batch in cases:
            bar.set_postfix_str(f"context {context}, batch {batch}")
            runs = take_turns(pair, context, batch, options, bar.update)
            speeds = [timed.speed(run, context, batch) for timed, run in zip((mine, theirs), runs, strict=True)]
            pairings.append(Pairing(context, batch, *speeds))
    return pairings


def _benchmark(
    mine: _Timed, theirs: _Timed, pairings: list[Pairing], skipped: Sequence[int], options: BenchOptions
) -> Benchmark:
    return Benchmark(
        model=mine.described(),
        against=theirs.described(),
        conditions=Conditions(
            task=mine.answer["task"],
            device=mine.answer["device"],
            dtype=mine.answer["dtype"],
            threads=mine.answer["threads"],
            cache="static" if options.static else "dynamic",
            new_tokens=options.steps,
            block=max(block_sizes(options.steps), default=0),
            repeats=options.repeats,
            warmup=options.warmup,
            seed=options.seed,
            peak_memory=mine.answer["memory"],
            mixture_of_experts=mine.weights.experts or theirs.weights.experts,
            processor=processor(),
        ),
        pairings=pairings,
        versions=installed_versions(),
        skipped=tuple(skipped),
    )


def _load(pair: Sequence[Worker], subjects: Sequence[Subject], options: BenchOptions) -> tuple[_Timed, _Timed]:
    """Load both, the base first, and the other in the precision that the base came to have."""
    theirs = _loaded(pair[1], subjects[1], options)
    mine = _loaded(pair[0], subjects[0], replace(options, dtype=theirs.answer["dtype"]))
    if mine.answer["vocabulary"] != theirs.answer["vocabulary"]:
        raise CheckpointError(
            f"{mine.subject.name} and {theirs.subject.name} have different vocabularies, of "
            f"{mine.answer['vocabulary']} and {theirs.answer['vocabulary']} tokens, so they cannot be compared."
        )
    return mine, theirs


def _loaded(worker: Worker, subject: Subject, options: BenchOptions) -> _Timed:
    answer = worker.ask("load", subject={**vars(subject), "folder": str(subject.folder)}, options=vars(options))
    layers = attention_layers(open_model(str(subject.folder)), subject.converted)
    return _Timed(worker=worker, subject=subject, answer=answer, weights=Weights(**answer["weights"]), layers=layers)


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    file = Path("/proc/cpuinfo")
    lines: Iterator[str] = iter(file.read_text().splitlines()) if file.exists() else iter(())
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
