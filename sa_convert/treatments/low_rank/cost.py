"""What low-rank keys cost a KV group, from one pass over each sequence.

Let dS[h, t, j] be the gradient of a loss at the score of head h for token t and key j. Keys that change by d[j] change
the loss to first order by e[t] = sum_h q[h, t] . sum_j dS[h, t, j] d[j], and the cost of a KV group is 1/2 sum_t
e[t]^2, as for sharing (`sa_convert.treatments.share.cost`).
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
from sa_convert.treatments.low_rank.rules import refusal
from sa_convert.treatments.low_rank.scores import change_of_loss, gradient_of_scores
from sa_convert.treatments.low_rank.trying import NAME

if TYPE_CHECKING:
    from sa_convert.treatments.ledger import Observed

PARTS = (0.75, 0.5)
"""Of the numbers of a key: what is on offer."""


class LowRankCosts(Ledger):
    """costs: for each unit and rank, in nats a token; repeated: the part of it that is on repetition, which counts
    `emphasis` times. Costs are those without a plan."""

    def __init__(self, units: Units, measure: Measure, plan: Plan | None = None) -> None:
        super().__init__(units, NAME, measure, without_plan=not plan)
        self.costs: dict[tuple[Unit, int], float] = {}
        self.repeated: dict[tuple[Unit, int], float] = {}
        self.emphasis = 1.0
        self._units: dict[int, list[Unit]] = {}
        for unit in units.all:
            if refusal(units.geometry, unit.layer) is None:
                self._units.setdefault(unit.layer, []).append(unit)

    def ranks(self, unit: Unit) -> tuple[int, ...]:
        """On offer, descending."""
        size = self.units.geometry.layers[unit.layer].head_dim
        return tuple(rank for part in PARTS if 0 < (rank := round(part * size)) < size)

    def add(self, observed: "Observed") -> None:
        if observed.slope or observed.layer not in self._units:
            return
        import torch

        assert observed.key is not None
        assert observed.turned is not None
        keys, scores, found = observed.key.float(), gradient_of_scores(observed), learned()
        back = observed.turned(keys, True)
        for unit in self._units[observed.layer]:
            for rank in self.ranks(unit):
                changes = torch.zeros(len(observed.gradient))
                for group in unit.groups:
                    reduced = found.basis(unit.layer, group, rank).reduced(back[group])
                    change = observed.turned(reduced[None], False)[0] - keys[group]
                    changes = changes + change_of_loss(observed, group, scores, change)
                cost = 0.5 * float(changes.double().square().sum()) * observed.weight
                self.costs[unit, rank] = self.costs.get((unit, rank), 0.0) + cost
                if observed.repetition:
                    self.repeated[unit, rank] = self.repeated.get((unit, rank), 0.0) + cost

    def join(self, *, screening: bool = False) -> None:
        self.costs, self.repeated = summed(self.costs), summed(self.repeated)

    def emphasized(self, emphasis: float) -> "LowRankCosts":
        other = copy(self)
        other.emphasis = emphasis
        return other

    def cost(self, unit: Unit, rank: int) -> float:
        return self.costs[unit, rank] + (self.emphasis - 1) * self.repeated.get((unit, rank), 0.0)

    def offers(self, unit: Unit, taken: Taken) -> Iterator[Offer]:
        for rank in self.ranks(unit):
            if (unit, rank) in self.costs:
                yield self.offer(unit, rank)

    def best(self, unit: Unit, taken: Taken) -> Offer | None:
        """That of the least rank, which saves the most."""
        return min(self.offers(unit, taken), key=lambda offer: -offer.saved, default=None)

    def offer(self, unit: Unit, rank: int) -> Offer:
        """Keys of this rank in all KV groups of a unit."""
        size = self.units.geometry.layers[unit.layer].head_dim
        saved = self.units.keys_of(unit) * (size - rank) // size
        return Offer(NAME, self.cost(unit, rank), saved, {group: {NAME: {"keys": rank}} for group in unit.groups})

    def given(self, plan: Plan) -> dict[Unit, Offer]:
        found = super().given(plan)
        return {unit: replace(offer, saved=self._saved(unit, offer)) for unit, offer in found.items()}

    def _saved(self, unit: Unit, offer: Offer) -> int:
        size = self.units.geometry.layers[unit.layer].head_dim
        return (
            sum(size - told[NAME]["keys"] for told in offer.plan.values())
            * self.units.keys_of(unit)
            // (size * len(unit.groups))
        )

    def value(self, unit: Unit, offer: Offer) -> float:
        rank = next(iter(offer.plan.values()))[NAME]["keys"]
        return self.cost(unit, rank) if (unit, rank) in self.costs else float("inf")
