"""What low rank costs a KV group, from one pass over each sequence.

Let dS[h, t, j] be the gradient of a loss at the score of head h for token t and key j, and u[h, t] that at the head's
output o[h, t]. Keys that change by d[j], and values so that outputs change by y[h, t], change the loss to first order
by

    e[t] = sum_h (q[h, t] . sum_j dS[h, t, j] d[j] + u[h, t] . y[h, t])

and the cost of a KV group is 1/2 sum_t e[t]^2, as for sharing (`sa_convert.treatments.share.cost`).
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit, Units
from sa_convert.models.processes import summed
from sa_convert.treatments.ledger import Ledger, Offer, Taken
from sa_convert.treatments.low_rank.learned import learned
from sa_convert.treatments.low_rank.rules import NAME, SIDES, Side, refusal
from sa_convert.treatments.low_rank.scores import change_of_loss, gradient_of_scores

if TYPE_CHECKING:
    import torch

    from sa_convert.treatments.ledger import Observed

PARTS = (0.75, 0.5)
"""Of the numbers of a key, and of a value: what is on offer."""

Ranks = tuple[tuple[Side, int], ...]
"""Of keys, of values, or of both."""

KINDS: dict[tuple[Side, ...], str] = {
    sides: f"{NAME} {' and '.join(sides)}" for sides in (*((s,) for s in SIDES), SIDES)
}
"""What estimates are compared with measurements by."""


class LowRankCosts(Ledger):
    """costs: for each unit and its ranks, in nats a token; repeated: the part of it that is on repetition, which counts
    `emphasis` times. Costs are those without a plan. kind: of offers that it makes; None: all."""

    def __init__(self, units: Units, measure: Measure, plan: Plan | None = None) -> None:
        super().__init__(units, NAME, measure, without_plan=not plan)
        self.costs: dict[tuple[Unit, Ranks], float] = {}
        self.repeated: dict[tuple[Unit, Ranks], float] = {}
        self.emphasis, self.kind = 1.0, ""
        self._units: dict[int, list[Unit]] = {}
        for unit in units.all:
            if self.sides(unit):
                self._units.setdefault(unit.layer, []).append(unit)

    def sides(self, unit: Unit) -> list[Side]:
        """What of a unit may be of low rank."""
        return [side for side in SIDES if refusal(self.units.geometry, unit.layer, side) is None]

    def ranks(self, unit: Unit) -> list[Ranks]:
        """On offer."""
        size = self.units.geometry.layers[unit.layer].head_dim
        sizes = [rank for part in PARTS if 0 < (rank := round(part * size)) < size]
        found: list[Ranks] = [()]
        for side in self.sides(unit):
            found += [(*ranks, (side, rank)) for ranks in found for rank in sizes]
        return found[1:]

    def add(self, observed: "Observed") -> None:
        if observed.slope or observed.layer not in self._units:
            return
        units = self._units[observed.layer]
        scores = gradient_of_scores(observed) if "keys" in self.sides(units[0]) else None
        for unit in units:
            changes = self._changes(unit, observed, scores)
            for ranks in self.ranks(unit):
                moved = sum(changes[part] for part in ranks)
                assert not isinstance(moved, int)
                cost = 0.5 * float(moved.double().square().sum()) * observed.weight
                self.costs[unit, ranks] = self.costs.get((unit, ranks), 0.0) + cost
                if observed.repetition:
                    self.repeated[unit, ranks] = self.repeated.get((unit, ranks), 0.0) + cost

    def _changes(
        self, unit: Unit, observed: "Observed", scores: "torch.Tensor | None"
    ) -> "dict[tuple[Side, int], torch.Tensor]":
        """e (T,) of keys, and of values, of each rank on offer. scores: dS (H, T, S)."""
        found: dict[tuple[Side, int], torch.Tensor] = {}
        bases, layer = learned(), self.units.geometry.layers[unit.layer]
        asked = {part for ranks in self.ranks(unit) for part in ranks}
        for side, rank in sorted(asked):
            moved = []
            for group in unit.groups:
                basis = bases.basis(unit.layer, group, rank, side)
                if side == "keys":
                    assert observed.key is not None
                    assert observed.turned is not None
                    assert scores is not None
                    key = observed.key[group].float()
                    reduced = basis.reduced(observed.turned(key[None], True)[0])
                    change = observed.turned(reduced[None], False)[0] - key
                    moved.append(change_of_loss(observed, group, scores, change))
                else:
                    heads = list(layer.heads_of(group))
                    output, gradient = observed.output[:, heads].float(), observed.gradient[:, heads].float()
                    moved.append(((basis.reduced(output) - output) * gradient).sum((1, 2)))
            found[side, rank] = sum(moved[1:], start=moved[0])
        return found

    def join(self, *, screening: bool = False) -> None:
        self.costs, self.repeated = summed(self.costs), summed(self.repeated)

    def emphasized(self, emphasis: float) -> "LowRankCosts":
        other = copy(self)
        other.emphasis = emphasis
        return other

    @property
    def kinds(self) -> tuple[str, ...]:
        found = {kind_of(ranks) for unit in self.units.all for ranks in self.ranks(unit)}
        return tuple(kind for kind in KINDS.values() if kind in found)

    def of_kind(self, kind: str) -> "LowRankCosts":
        other = copy(self)
        other.kind = kind
        return other

    def cost(self, unit: Unit, ranks: Ranks) -> float:
        return self.costs[unit, ranks] + (self.emphasis - 1) * self.repeated.get((unit, ranks), 0.0)

    def offers(self, unit: Unit, taken: Taken) -> Iterator[Offer]:
        for ranks in self.ranks(unit):
            if (unit, ranks) in self.costs and self.kind in ("", kind_of(ranks)):
                yield self.offer(unit, ranks)

    def best(self, unit: Unit, taken: Taken) -> Offer | None:
        """Of those that save the most of keys, the cheapest."""
        return min(self.offers(unit, taken), key=lambda offer: (-offer.saved, offer.cost), default=None)

    def offer(self, unit: Unit, ranks: Ranks) -> Offer:
        """These ranks in all KV groups of a unit."""
        plan = {group: {NAME: dict(ranks)} for group in unit.groups}
        found = Offer(NAME, self.cost(unit, ranks), 0, plan, kind=kind_of(ranks))
        return replace(found, saved=self._saved(unit, found))

    def given(self, plan: Plan) -> dict[Unit, Offer]:
        found = super().given(plan)
        return {
            unit: replace(offer, saved=self._saved(unit, offer), kind=kind_of(_ranks(offer)))
            for unit, offer in found.items()
        }

    def _saved(self, unit: Unit, offer: Offer) -> int:
        size = self.units.geometry.layers[unit.layer].head_dim
        left = sum(size - told[NAME].get("keys", size) for told in offer.plan.values())
        return left * self.units.keys_of(unit) // (size * len(unit.groups))

    def value(self, unit: Unit, offer: Offer) -> float:
        ranks = _ranks(offer)
        return self.cost(unit, ranks) if (unit, ranks) in self.costs else float("inf")


def kind_of(ranks: Ranks) -> str:
    """The name of the kind of offers that these are of."""
    return KINDS[tuple(side for side, _ in ranks)]


def _ranks(offer: Offer) -> Ranks:
    """Of the first of an offer's KV groups."""
    told = next(iter(offer.plan.values()))[NAME]
    return tuple((side, told[side]) for side in SIDES if side in told)
