"""What healing did: the contents of report.json under "heal"."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Judgement:
    """A model on held-out text and held-out copying. All are in nats a token.

    tokens: that were trained on before. divergence: KL(base || model) by kind of text, which training lowers. text:
    loss by kind of text. copying: loss by the distance of what is copied. training: mean of the training loss since the
    judgement before, None at the start.
    """

    tokens: int
    divergence: Mapping[str, float]
    text: Mapping[str, float]
    copying: Mapping[int, float]
    training: float | None = None

    @property
    def mean_divergence(self) -> float:
        return _mean(self.divergence.values())

    @property
    def mean_text(self) -> float:
        return _mean(self.text.values())

    @property
    def mean_copying(self) -> float:
        return _mean(self.copying.values())

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (*self.divergence.values(), *self.text.values(), *self.copying.values())))

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "divergence": {kind: _rounded(loss) for kind, loss in self.divergence.items()},
            "text": {kind: _rounded(loss) for kind, loss in self.text.items()},
            "copying": {str(distance): _rounded(loss) for distance, loss in self.copying.items()},
            "training": None if self.training is None else _rounded(self.training),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Judgement":
        return cls(
            content["tokens"],
            {kind: _number(loss) for kind, loss in content["divergence"].items()},
            {kind: _number(loss) for kind, loss in content["text"].items()},
            {int(distance): _number(loss) for distance, loss in content["copying"].items()},
            content["training"],
        )


@dataclass(frozen=True)
class HealReport:
    """base: the base model, judged as the others. curve: the model before healing, and then every so often. kept: which
    of the curve was kept, or None if none was good enough.

    settings: as in the recipe. text: its name. tensors, parameters: how many were trained. seconds: of training.
    processes: that trained. dtype: of the computation.
    """

    settings: Mapping[str, Any]
    text: str
    tensors: int
    parameters: int
    base: Judgement
    curve: tuple[Judgement, ...]
    kept: int | None
    seconds: float
    dtype: str
    processes: int = 1
    refused: tuple[str, ...] = field(default=())
    """What was worse than before in the last of the curve, if none was kept."""

    @property
    def before(self) -> Judgement:
        return self.curve[0]

    @property
    def after(self) -> Judgement:
        """What was kept."""
        return self.curve[self.kept or 0]

    @property
    def tokens(self) -> int:
        """That were trained on."""
        return self.curve[-1].tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "text": self.text,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "tokens": self.tokens,
            "kept_tokens": None if self.kept is None else self.after.tokens,
            "seconds": round(self.seconds, 1),
            "dtype": self.dtype,
            "processes": self.processes,
            **({"refused": list(self.refused)} if self.refused else {}),
            "base": self.base.to_json(),
            "curve": [judgement.to_json() for judgement in self.curve],
        }


def told_changes(report: HealReport) -> Iterator[str]:
    """Such as "held-out text 3.210 -> 3.105 nats (base 3.050)", and the same of copying and of the divergence."""
    change = f"{report.before.mean_divergence:.4f} -> {report.after.mean_divergence:.4f} nats"
    yield f"divergence on held-out text {change}"
    for label, of in (("held-out text", "mean_text"), ("copying", "mean_copying")):
        before, after, base = (getattr(one, of) for one in (report.before, report.after, report.base))
        yield f"{label} {before:.3f} -> {after:.3f} nats (base {base:.3f})"


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _rounded(loss: float) -> float | None:
    return round(loss, 5) if math.isfinite(loss) else None


def _number(loss: float | None) -> float:
    return math.inf if loss is None else loss
