"""What calibration found: the contents of report.json under "refit"."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sa_convert.domain.stacks import Stacks, layer_label

Measure = Literal["fisher", "output error"]
"""How costs are measured: in nats of divergence, or by the error of a layer's output."""


@dataclass(frozen=True)
class LayerRefit:
    """strength: of the ridge, or None if no strength helped. text, repetition: the squared error that is left on
    held-out samples, as a part of that without a refit (1 without a refit; repetition is None without such samples)."""

    strength: float | None
    text: float
    repetition: float | None


@dataclass(frozen=True)
class Distance:
    """How far a model is from the base on some samples. All are means over scored tokens, in nats a token.

    loss: negative log-likelihood; divergence: KL(base || model), both of all samples but random repetition, of which
    repetition_divergence is (None without such samples). losses: the mean loss of each such sample, copying: of each
    sample of random repetition.
    """

    loss: float
    divergence: float
    repetition_divergence: float | None
    losses: tuple[float, ...] = ()
    copying: tuple[float, ...] = ()

    def no_worse(self, other: "Distance") -> bool:
        """Less divergence on text, and no more on repetition."""
        if self.repetition_divergence is None or other.repetition_divergence is None:
            return self.divergence < other.divergence
        return self.divergence < other.divergence and self.repetition_divergence <= other.repetition_divergence

    def to_json(self) -> dict[str, Any]:
        rounded = {"text": round(self.divergence, 6)}
        if self.repetition_divergence is not None:
            rounded["repetition"] = round(self.repetition_divergence, 6)
        return rounded


@dataclass(frozen=True)
class RefitReport:
    """share: the part of the way from the base's matrices to the fitted ones, 0 if they did not help.

    layers: of every layer that the plan changes. before, after: the divergence from the base on held-out samples. text,
    sequences, length: what it was fitted on.
    """

    share: float
    layers: Mapping[int, LayerRefit]
    before: Distance
    after: Distance
    text: str
    sequences: int
    length: int

    def to_json(self, stacks: Stacks = ()) -> dict[str, Any]:
        """stacks: those of the model, which name its layers."""
        return {
            "share": self.share,
            "divergence": {"before": self.before.to_json(), "after": self.after.to_json()},
            "layers": {
                layer_label(stacks, layer): {
                    "strength": fit.strength,
                    "text": round(fit.text, 4),
                    "repetition": None if fit.repetition is None else round(fit.repetition, 4),
                }
                for layer, fit in sorted(self.layers.items())
            },
            "calibration": {"text": self.text, "sequences": self.sequences, "length": self.length},
        }
