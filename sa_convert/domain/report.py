"""What a conversion did, saved and cost: the contents of report.json."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sa_convert.domain.agreement import Agreement
from sa_convert.domain.calibrated import RefitReport
from sa_convert.domain.change import CacheBytes, Change, Savings
from sa_convert.domain.healed import HealReport
from sa_convert.domain.long_context import LongChange
from sa_convert.domain.losses import LossChange
from sa_convert.domain.stacks import Stacks
from sa_convert.domain.stock import StockForm
from sa_convert.domain.treated import Treated

PredictionTask = Literal["next-token", "masked-token", "teacher-forced"]
"""What a loss or perplexity is of: tokens that follow those before them, masked ones, or a decoder's spans."""

TASK_NAMES: Mapping[PredictionTask, str] = {
    "next-token": "",
    "masked-token": " (masked-token)",
    "teacher-forced": " (teacher-forced)",
}
"""What follows the word perplexity, if it is not the usual one."""


@dataclass(frozen=True)
class BaseModel:
    """The model that was converted. id: `org/name` on the Hub, or the name of a local folder or file (never its path,
    so that a conversion gives the same files on every machine). revision: its commit on the Hub, or None. code: the
    Python files in it that the user trusted, of this revision."""

    id: str
    revision: str | None = None
    code: tuple[str, ...] = ()

    @classmethod
    def of(cls, identity: str, revision: str | None = None) -> "BaseModel":
        """From what the user called the model."""
        if Path(identity).expanduser().exists():
            return cls(Path(identity).expanduser().resolve().name, revision)
        return cls(identity, revision)

    def with_code(self, files: Iterable[Path]) -> "BaseModel":
        return replace(self, code=tuple(path.as_posix() for path in files))

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "revision": self.revision} | ({"code": list(self.code)} if self.code else {})

    @property
    def on_hub(self) -> bool:
        return "/" in self.id


@dataclass(frozen=True)
class StoredPerplexity:
    """Perplexity of both models on a few sequences in the dtype of their files, and on the same ones as computed."""

    dtype: str
    tokens: int
    before: float
    after: float
    exact_before: float
    exact_after: float

    @property
    def rounding(self) -> float:
        """What the converted model loses by rounding, more than its base: 0.01 is 1%."""
        return (self.after / self.exact_after) / (self.before / self.exact_before) - 1


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity of both models on the same tokens. dtype: in which both were computed. task: of which tokens.
    increase: 0.05 is 5%. stored: in the dtype of their files, if it is another one."""

    text: str
    tokens: int
    before: float
    after: float
    dtype: str
    task: PredictionTask = "next-token"
    stored: StoredPerplexity | None = None

    @property
    def increase(self) -> float:
        return self.after / self.before - 1


@dataclass(frozen=True)
class DecodeCheck:
    """Decoding with a cache against one pass without. tolerance: the difference that rounding may make."""

    max_abs_logit_difference: float
    same_greedy_tokens: bool
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_abs_logit_difference <= self.tolerance and self.same_greedy_tokens


@dataclass(frozen=True)
class CopyingReport:
    """Loss of both models on tokens that occur again after `period` random ones, in nats per token.

    tokens: how many. distances: how far back they stand, and losses of tokens that occur for the second time. See
    `sa_convert.measure.quality.copying`.
    """

    period: int
    tokens: int
    before: float
    after: float
    distances: tuple[tuple[int, LossChange], ...] = ()

    @property
    def increase(self) -> float:
        """In nats."""
        return self.after - self.before


@dataclass(frozen=True)
class GateResult:
    """The limits, and whether the converted model stays within them. max_copying_increase: in nats, or None."""

    max_perplexity_increase: float
    passed: bool
    max_copying_increase: float | None = None

    def to_json(self) -> dict[str, Any]:
        copying = {} if self.max_copying_increase is None else {"max_copying_increase": self.max_copying_increase}
        return {"max_perplexity_increase": self.max_perplexity_increase, **copying, "passed": self.passed}


@dataclass(frozen=True)
class Validation:
    """What was measured by running both models. decode_check: None if they cache nothing. gate: None if no limit
    was set. copying: None if they do not predict the next token. agreement: with the base model's predictions, None
    if there was no room to keep them. cache: of a sequence whose length depends on what the model is for. long: None if
    nothing was measured of long context."""

    perplexity: PerplexityReport
    decode_check: DecodeCheck | None
    gate: GateResult | None
    cache_bytes_per_token: Change
    copying: CopyingReport | None
    agreement: Agreement | None = None
    cache: CacheBytes | None = None
    long: LongChange | None = None


@dataclass(frozen=True)
class Report:
    """All of report.json. The parts that validation measures are None with --no-validate. cache: of a sequence of the
    length that the model is for; None if it caches nothing. auto_class: the class of transformers that loads the model.
    stacks: those of the model, which name its layers."""

    base_model: BaseModel
    family: str
    treated: tuple[Treated, ...]
    savings: Savings
    perplexity: PerplexityReport | None = None
    decode_check: DecodeCheck | None = None
    gate: GateResult | None = None
    copying: CopyingReport | None = None
    agreement: Agreement | None = None
    cache: CacheBytes | None = None
    long: LongChange | None = None
    refit: RefitReport | None = None
    heal: HealReport | None = None
    recipe: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    auto_class: str = "AutoModelForCausalLM"
    stacks: Stacks = ()
    stock: StockForm | None = None
    """How it was written for an engine with a class of its own; None: for the code that it carries."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Keys of report.json as an earlier report of the same conversion has them."""

    @property
    def sections(self) -> dict[str, Any]:
        """What treatments add to report.json."""
        return {key: value for treated in self.treated for key, value in treated.section.items()}

    @property
    def used(self) -> tuple[Treated, ...]:
        """What was done by the treatments that the plan uses."""
        return tuple(treated for treated in self.treated if treated.used)

    @property
    def caches(self) -> bool:
        """Whether the model caches anything at all."""
        return self.savings.cache_bytes_per_token.before > 0

    def to_json(self) -> dict[str, Any]:
        """As in report.json. Floats are rounded to the digits that mean something."""
        return {
            "base_model": self.base_model.to_json(),
            "family": self.family,
            "recipe": self.recipe,
            **({"for": self.stock.to_json()} if self.stock else {}),
            **self.sections,
            "treatments": {treated.name: dict(treated.counts) for treated in self.used},
            "savings": self.savings.to_json(),
            "cache_bytes": self.cache and self.cache.to_json(),
            "perplexity": self.perplexity and _perplexity_json(self.perplexity),
            "decode_check": self.decode_check and _decode_json(self.decode_check),
            "gate": self.gate and self.gate.to_json(),
            "copying": self.copying and _copying_json(self.copying),
            "long_text": self.long and self.long.text_json(),
            "needle": self.long and self.long.needle_json(),
            "agreement": self.agreement and self.agreement.to_json(),
            "refit": self.refit and self.refit.to_json(self.stacks),
            **({"heal": self.heal.to_json()} if self.heal else {}),
            "versions": dict(sorted(self.versions.items())),
            **self.kept,
        }


def _perplexity_json(perplexity: PerplexityReport) -> dict[str, Any]:
    task = {} if perplexity.task == "next-token" else {"task": perplexity.task}
    return {
        "text": perplexity.text,
        **task,
        "tokens": perplexity.tokens,
        "before": round(perplexity.before, 4),
        "after": round(perplexity.after, 4),
        "increase": round(perplexity.increase, 6),
        "dtype": perplexity.dtype,
        **({"stored": _stored_json(perplexity.stored)} if perplexity.stored else {}),
    }


def _stored_json(stored: StoredPerplexity) -> dict[str, Any]:
    return {
        "dtype": stored.dtype,
        "tokens": stored.tokens,
        "before": round(stored.before, 4),
        "after": round(stored.after, 4),
        "rounding": round(stored.rounding, 6),
    }


def _copying_json(copying: CopyingReport) -> dict[str, Any]:
    loss = {"before": copying.before, "after": copying.after}
    return {
        **{str(distance): change.to_json() for distance, change in copying.distances},
        "loss": {key: round(value, 4) if math.isfinite(value) else None for key, value in loss.items()},
        "period": copying.period,
        "tokens": copying.tokens,
    }


def _decode_json(check: DecodeCheck) -> dict[str, Any]:
    return {
        "max_abs_logit_difference": float(f"{check.max_abs_logit_difference:.2g}"),
        "same_greedy_tokens": check.same_greedy_tokens,
        "tolerance": float(f"{check.tolerance:.2g}"),
    }
