"""What `bench` measures: two models in turns, for each context and batch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from sa_convert.domain.report import PredictionTask
from sa_convert.domain.rounding import digits


@dataclass(frozen=True)
class Spread:
    """Values of repeated runs, at least one, and what is said of them: median, first and third quartile."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.runs)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.runs) == 1:
            return self.runs[0], self.runs[0]
        first, _, third = quantiles(self.runs, n=4, method="inclusive")
        return first, third

    def ratio_to(self, other: "Spread") -> "Spread":
        """Run by run: run i of both was measured one right after the other."""
        return Spread(tuple(mine / theirs for mine, theirs in zip(self.runs, other.runs, strict=True)))

    def to_json(self) -> dict[str, Any]:
        first, third = self.quartiles
        return {
            "median": digits(self.median),
            "quartiles": [digits(first), digits(third)],
            "runs": [digits(run) for run in self.runs],
        }


@dataclass(frozen=True)
class Speed:
    """One model at one context and batch.

    prefill: seconds of a pass over the context. step: seconds of decoding one token for each sequence, or None if
    the model caches nothing. cache_bytes: of the whole batch, once the context is cached. peak_memory: bytes.
    prefill_flops, step_bytes: what the work is expected to be, see `sa_convert.measure.speed.expected_work`.
    """

    prefill: Spread
    step: Spread | None
    cache_bytes: int | None
    peak_memory: int
    prefill_flops: int | None
    step_bytes: int | None


@dataclass(frozen=True)
class Pairing:
    """Both models at one context (tokens) and batch (sequences)."""

    context: int
    batch: int
    model: Speed
    against: Speed

    @property
    def prefill_ratio(self) -> Spread:
        return self.model.prefill.ratio_to(self.against.prefill)

    @property
    def step_ratio(self) -> Spread | None:
        mine, theirs = self.model.step, self.against.step
        return mine.ratio_to(theirs) if mine and theirs else None

    @property
    def cache_ratio(self) -> float | None:
        return _ratio(self.model.cache_bytes, self.against.cache_bytes)

    @property
    def memory_ratio(self) -> float:
        return self.model.peak_memory / self.against.peak_memory

    @property
    def expected_prefill(self) -> float | None:
        return _ratio(self.model.prefill_flops, self.against.prefill_flops)

    @property
    def expected_step(self) -> float | None:
        return _ratio(self.model.step_bytes, self.against.step_bytes)

    def prefill_rate(self, speed: Speed) -> float:
        """Tokens per second."""
        return self.context * self.batch / speed.prefill.median

    def step_rate(self, speed: Speed) -> float | None:
        """Tokens per second of all sequences together."""
        return self.batch / speed.step.median if speed.step else None

    def to_json(self) -> dict[str, Any]:
        step = self.step_ratio
        return {
            "context": self.context,
            "batch": self.batch,
            "model": self._speed_json(self.model),
            "against": self._speed_json(self.against),
            "ratio": {
                "prefill": self.prefill_ratio.to_json(),
                "step": step and step.to_json(),
                "cache_bytes": digits(self.cache_ratio),
                "peak_memory": digits(self.memory_ratio),
            },
            "expected": {"prefill": digits(self.expected_prefill), "step": digits(self.expected_step)},
        }

    def _speed_json(self, speed: Speed) -> dict[str, Any]:
        return {
            "prefill_seconds": speed.prefill.to_json(),
            "prefill_tokens_per_second": digits(self.prefill_rate(speed)),
            "step_seconds": speed.step and speed.step.to_json(),
            "step_tokens_per_second": digits(self.step_rate(speed)),
            "cache_bytes": speed.cache_bytes,
            "peak_memory": speed.peak_memory,
            "expected_prefill_flops": speed.prefill_flops,
            "expected_step_bytes": speed.step_bytes,
        }


@dataclass(frozen=True)
class BenchedModel:
    """A model that was timed."""

    id: str
    """What results call it."""

    parameters: int
    weight_bytes: int
    """Of all parameters in memory, those in use twice counted once."""

    attention: str
    """The implementation that ran, such as "sdpa"."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What both models ran under."""

    task: PredictionTask
    device: str
    dtype: str
    threads: int
    cache: str
    """"dynamic" or "static"."""

    new_tokens: int
    """Decoded in a turn."""

    block: int
    """Steps, at the most, until the other model's turn came."""

    repeats: int
    warmup: int
    seed: int
    peak_memory: str
    """What it is of; see `sa_convert.measure.speed.peak_memory`."""

    mixture_of_experts: bool
    """A token uses only some of the weights that are counted."""

    processor: str


@dataclass(frozen=True)
class Benchmark:
    """Everything. skipped: contexts that were not asked for by name and that the models have no positions for."""

    model: BenchedModel
    against: BenchedModel
    conditions: Conditions
    pairings: Sequence[Pairing]
    versions: Mapping[str, str]
    skipped: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For --json and bench.json."""
        return {
            "model": asdict(self.model),
            "against": asdict(self.against),
            "conditions": asdict(self.conditions),
            "results": [pairing.to_json() for pairing in self.pairings],
            "versions": dict(self.versions),
        }


def _ratio(mine: int | None, theirs: int | None) -> float | None:
    return mine / theirs if mine is not None and theirs else None
