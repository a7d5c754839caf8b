"""What a model does with a long context: text by position, and a needle. Copying by distance is in `evaluation`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sa_convert.domain.losses import LossChange, Losses
from sa_convert.domain.rounding import digits


@dataclass(frozen=True)
class PositionLosses:
    """Losses of the tokens at positions from `start` to before `stop`, by text. The token at position 0 has none."""

    start: int
    stop: int
    losses: Losses


@dataclass(frozen=True)
class NeedleLosses:
    """Losses of code words that were planted at this depth of a text (0 is its beginning, 1 its end), by text."""

    depth: float
    losses: Losses

    @property
    def label(self) -> str:
        """Such as "25%"."""
        return f"{round(self.depth * 100)}%"


@dataclass(frozen=True)
class LongContext:
    """One model. length: tokens of a text. texts: losses of whole texts. positions, needle: empty if there is none."""

    length: int
    texts: Losses
    positions: tuple[PositionLosses, ...]
    needle: tuple[NeedleLosses, ...] = ()

    def text_json(self) -> dict[str, Any]:
        """`long_text` of `evaluate --json`."""
        return {
            "length": self.length,
            "sequences": len(self.texts.samples),
            "loss": digits(self.texts.mean),
            "error": digits(self.texts.error),
            "perplexity": digits(self.texts.perplexity),
            "by_position": [
                {"from": at.start, "to": at.stop, **at.losses.to_json(), "perplexity": digits(at.losses.perplexity)}
                for at in self.positions
            ],
        }

    def needle_json(self) -> dict[str, Any] | None:
        """`needle` of `evaluate --json`: losses by depth, in nats."""
        return {at.label: at.losses.to_json() for at in self.needle} or None


@dataclass(frozen=True)
class LongChange:
    """Two models on the same texts: the base, or the other model, and the one that is looked at."""

    before: LongContext
    after: LongContext

    @property
    def texts(self) -> LossChange:
        return LossChange(self.before.texts, self.after.texts)

    @property
    def positions(self) -> Iterator[tuple[int, int, LossChange]]:
        """First position, the one after the last, and the losses there."""
        for before, after in zip(self.before.positions, self.after.positions, strict=True):
            yield before.start, before.stop, LossChange(before.losses, after.losses)

    @property
    def needle(self) -> Iterator[tuple[str, LossChange]]:
        """Depth as people write it, and the losses there."""
        for before, after in zip(self.before.needle, self.after.needle, strict=True):
            yield before.label, LossChange(before.losses, after.losses)

    def text_json(self) -> dict[str, Any]:
        """`long_text` of report.json: perplexities."""
        return {
            "length": self.before.length,
            "sequences": len(self.before.texts.samples),
            **self.texts.perplexity_json(),
            "by_position": [
                {"from": start, "to": stop, **change.perplexity_json()} for start, stop, change in self.positions
            ],
        }

    def needle_json(self) -> dict[str, Any] | None:
        """`needle` of report.json: losses by depth, in nats."""
        return {depth: change.to_json() for depth, change in self.needle} or None
