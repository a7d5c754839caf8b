"""The frontier of a model: the least loss that was found for each saving, by the treatments that a search may use."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sa_convert.domain.change import Change
from sa_convert.domain.plan import Plan
from sa_convert.domain.rounding import digits

COLUMNS = (
    *("treatments", "at", "cache_bytes_before", "cache_bytes_after", "cache_removed", "loss_rise"),
    *("perplexity_increase", "copying_rise", "copying_distance", "recipe"),
)


@dataclass(frozen=True)
class FrontierPoint:
    """A plan that a search came by.

    treatments: those that the search could use. cache: bytes of one sequence. loss: rise of the mean loss on held-out
    text, in nats a token, with its standard error. copying: rise of the loss on held-out repetition by its period, and
    on facts that are asked for at the end of a long text under 0. recipe: the file that holds the plan.
    """

    treatments: tuple[str, ...]
    plan: Plan
    cache: Change
    loss: float
    error: float
    copying: Mapping[int, float] = field(default_factory=dict)
    recipe: str = ""

    @property
    def worst_copying(self) -> tuple[int, float] | None:
        """The distance at which copying lost most, and by how much; None if it was not measured."""
        return max(self.copying.items(), key=lambda item: item[1], default=None)


@dataclass(frozen=True)
class Frontier:
    """at: tokens of the sequence that is cached. points: of every set of treatments, each in the order of what is
    saved."""

    at: int
    points: tuple[FrontierPoint, ...]

    def lines(self) -> dict[tuple[str, ...], list[FrontierPoint]]:
        """The points by set of treatments."""
        found: dict[tuple[str, ...], list[FrontierPoint]] = {}
        for point in self.points:
            found.setdefault(point.treatments, []).append(point)
        return found

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Of frontier.csv, in the order of COLUMNS."""
        from math import expm1

        for point in self.points:
            distance, copying = point.worst_copying or (None, None)
            yield (
                *("+".join(point.treatments), self.at, point.cache.before, point.cache.after),
                *(round(point.cache.removed, 6), digits(point.loss), digits(expm1(point.loss)), digits(copying)),
                *("facts" if distance == 0 else distance, point.recipe),
            )

    def to_json(self) -> dict[str, Any]:
        points = [
            {
                "treatments": list(point.treatments),
                "cache_bytes": {"before": point.cache.before, "after": point.cache.after},
                "cache_removed": round(point.cache.removed, 6),
                "loss_rise": {"mean": digits(point.loss), "error": digits(point.error)},
                "copying_rise": {
                    str(period or "facts"): digits(rise) for period, rise in sorted(point.copying.items())
                },
                "recipe": point.recipe or None,
            }
            for point in self.points
        ]
        return {"at": self.at, "points": points}
