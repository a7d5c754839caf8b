"""Losses of several independent samples, and how sure their mean is."""

import math
from dataclasses import dataclass
from typing import Any

from sa_convert.domain.rounding import digits


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error, which is None if there is one sample only."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: tuple[float, ...]) -> "Mean":
        """Raises ValueError if there are no values."""
        if not values:
            raise ValueError("a mean needs a value")
        mean = sum(values) / len(values)
        if len(values) < 2:
            return cls(mean, None)
        squares = sum((value - mean) ** 2 for value in values)
        return cls(mean, math.sqrt(squares / (len(values) - 1) / len(values)))


@dataclass(frozen=True)
class Losses:
    """Mean losses of a model on each of several samples (texts, probes), in nats a token."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        return Mean.of(self.samples).value

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None if there are fewer than two samples."""
        return Mean.of(self.samples).error if self.samples else None

    @property
    def perplexity(self) -> float:
        """Infinite if it is too large for a number."""
        return perplexity_of(self.mean)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.mean)

    def to_json(self) -> dict[str, Any]:
        return {"loss": digits(self.mean), "error": digits(self.error)}


@dataclass(frozen=True)
class LossChange:
    """Losses of two models on the same samples: `before` of the base or of the other model, `after` of the model."""

    before: Losses
    after: Losses

    @property
    def rise(self) -> Mean:
        """Of the loss, in nats. The error is that of paired differences, since most of what differs from sample to
        sample is the same for both models."""
        pairs = zip(self.before.samples, self.after.samples, strict=True)
        return Mean.of(tuple(after - before for before, after in pairs))

    @property
    def increase(self) -> float:
        """Of the perplexity: 0.05 is 5%."""
        return math.expm1(self.rise.value) if self.rise.value < 700 else math.inf

    @property
    def increase_error(self) -> float | None:
        """Standard error of `increase`."""
        error = self.rise.error
        return None if error is None else error * (1 + self.increase)

    def to_json(self) -> dict[str, Any]:
        """Losses of both in nats, and the standard error of the rise."""
        return {"before": digits(self.before.mean), "after": digits(self.after.mean), "error": digits(self.rise.error)}

    def perplexity_json(self) -> dict[str, Any]:
        """Perplexities of both, and by how much it rises, with the standard error of that."""
        return {
            "before": digits(self.before.perplexity),
            "after": digits(self.after.perplexity),
            "increase": digits(self.increase),
            "error": digits(self.increase_error),
        }


def perplexity_of(loss: float) -> float:
    """Infinite, or not a number, if the loss is, or if it is too large for a number."""
    return math.exp(loss) if loss < 700 else loss * math.inf
