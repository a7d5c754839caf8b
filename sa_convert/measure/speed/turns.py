"""Two models that run in turns, so that whatever else the machine does hits both alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from sa_convert.domain.benchmark import Spread
from sa_convert.measure.speed.process import Worker
from sa_convert.measure.speed.request import BenchOptions

BLOCK = 8
"""Steps that a model decodes until it is the other's turn. Long enough for its weights to be back in the processor's
caches, short enough for both to meet the same machine."""


@dataclass
class Turns:
    """What one model did at one context and batch. prefills: seconds. blocks: the median of each block of steps, in
    seconds. cache_bytes: after a prefill; None without a cache."""

    prefills: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    peak_memory: int = 0

    @property
    def prefill(self) -> Spread:
        return Spread(tuple(self.prefills))

    @property
    def step(self) -> Spread | None:
        return Spread(tuple(self.blocks)) if self.blocks else None


def take_turns(
    workers: Sequence[Worker], context: int, batch: int, options: BenchOptions, told: Callable[[], Any] = lambda: None
) -> list[Turns]:
    """What each did, run i of one right after run i of the other.

    A turn is a prefill by each, then blocks of steps, by each in turn; the first `options.warmup` turns do not count.
    Peak memory is that of all turns. There are no steps for models without a cache. told: called after each turn.
    """
    steps = options.steps
    runs = [Turns() for _ in workers]
    for worker in workers:
        worker.ask("begin", context=context, batch=batch, steps=steps)
    for turn in range(options.warmup + options.repeats):
        prefills = [worker.ask("prefill") for worker in workers]
        blocks = [[worker.ask("decode", steps=size)["seconds"] for worker in workers] for size in block_sizes(steps)]
        if turn >= options.warmup:
            for number, run in enumerate(runs):
                run.prefills.append(prefills[number]["seconds"])
                run.blocks += [median(block[number]) for block in blocks]
                run.cache_bytes = prefills[number]["cache_bytes"]
        told()
    for worker, run in zip(workers, runs, strict=True):
        run.peak_memory = worker.ask("end")["peak_memory"]
    return runs


def block_sizes(steps: int) -> list[int]:
    """As equal as can be, none longer than BLOCK: 12 -> [6, 6]."""
    count = -(-steps // BLOCK)
    return [steps // count + (number < steps % count) for number in range(count)]
