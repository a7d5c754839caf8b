"""What `evaluate` measures: one model, or two on the same tokens."""

from dataclasses import dataclass
from typing import Any

from sa_convert.domain.agreement import Agreement
from sa_convert.domain.long_context import LongChange, LongContext
from sa_convert.domain.losses import LossChange, Losses
from sa_convert.domain.report import DecodeCheck, PredictionTask
from sa_convert.domain.rounding import digits


@dataclass(frozen=True)
class CopyingLoss:
    """Loss on tokens that a model can copy from `distance` tokens before, in nats per token.

    loss: the mean from the second occurrence on. tokens: how many. by_occurrence: the means of the second occurrence,
    the third, and so on; the last may be cut off by the end of the probe. probes: those of the second occurrence in
    each probe.
    """

    distance: int
    tokens: int
    loss: float
    by_occurrence: tuple[float, ...]
    probes: tuple[float, ...] = ()

    @property
    def second(self) -> float:
        return self.by_occurrence[0]

    @property
    def by_probe(self) -> Losses:
        """Of the second occurrence."""
        return Losses(self.probes)


@dataclass(frozen=True)
class ModelQuality:
    """One model. name: `org/name` or the name of a folder or file. dtype: in which it was computed. loss: of the text,
    in nats per token. decode_check: None if the model caches nothing. copying: at every distance; the one at
    `period` goes beyond the second occurrence; empty if the model does not predict the next token. long: what it does
    with long context, or None if that was not measured."""

    name: str
    dtype: str
    loss: float
    perplexity: float
    decode_check: DecodeCheck | None
    copying: tuple[CopyingLoss, ...]
    period: int
    long: LongContext | None = None

    @property
    def headline(self) -> CopyingLoss:
        return next(copying for copying in self.copying if copying.distance == self.period)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "dtype": self.dtype,
            "loss": digits(self.loss),
            "perplexity": digits(self.perplexity),
            "decode_check": self.decode_check and _decode_json(self.decode_check),
            "copying": self._copying_json() if self.copying else None,
            "long_text": self.long and self.long.text_json(),
            "needle": self.long and self.long.needle_json(),
        }

    def _copying_json(self) -> dict[str, Any]:
        return {
            "period": self.period,
            "loss": digits(self.headline.loss),
            "tokens": self.headline.tokens,
            "by_occurrence": [digits(loss) for loss in self.headline.by_occurrence],
            "by_distance": [
                {"distance": one.distance, "loss": digits(one.second), "error": digits(one.by_probe.error)}
                for one in self.copying
            ],
        }


@dataclass(frozen=True)
class Evaluation:
    """A model, and with `against` another on the same tokens. text: its name. task: which tokens were predicted.

    tokens: how many. probes: how many of `probe_length` tokens were made for each distance, by `seed`, or 0 if
    copying was not probed.
    """

    text: str
    task: PredictionTask
    tokens: int
    sequences: int
    length: int
    seed: int
    probes: int
    probe_length: int
    model: ModelQuality
    against: ModelQuality | None = None
    agreement: Agreement | None = None

    def to_json(self) -> dict[str, Any]:
        """For --json. A number that is not finite is null."""
        return {
            "text": {"name": self.text, "tokens": self.tokens, "sequences": self.sequences, "length": self.length},
            "task": self.task,
            "probes": {"number": self.probes, "length": self.probe_length, "seed": self.seed} if self.probes else None,
            "model": self.model.to_json(),
            "against": self.against and self.against.to_json(),
            "agreement": self.agreement and self.agreement.to_json(),
            "change": self._change_json(),
        }

    @property
    def copying_change(self) -> tuple[tuple[int, LossChange], ...]:
        """Of each distance, from the other model to this one; empty if there is no other."""
        if self.against is None:
            return ()
        pairs = zip(self.against.copying, self.model.copying, strict=True)
        return tuple((before.distance, LossChange(before.by_probe, after.by_probe)) for before, after in pairs)

    @property
    def long_change(self) -> LongChange | None:
        """From the other model to this one."""
        if self.against is None or self.against.long is None or self.model.long is None:
            return None
        return LongChange(self.against.long, self.model.long)

    def _change_json(self) -> dict[str, Any] | None:
        """As report.json tells the same of a base and its conversion; `before` is the other model."""
        if self.against is None:
            return None
        long = self.long_change
        return {
            "copying": {str(distance): change.to_json() for distance, change in self.copying_change} or None,
            "long_text": long and long.text_json(),
            "needle": long and long.needle_json(),
        }


def _decode_json(check: DecodeCheck) -> dict[str, Any]:
    return {
        "max_abs_logit_difference": digits(check.max_abs_logit_difference),
        "same_greedy_tokens": check.same_greedy_tokens,
        "tolerance": digits(check.tolerance),
        "passed": check.passed,
    }
