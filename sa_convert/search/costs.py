"""What it costs a head to use another head's probabilities, for all pairs, from one pass over each sequence.

Let u[h, t] be the gradient of a loss at the output of head h (before the output projection) at token t. Giving head h
the probabilities of head j changes the loss by e[h, j, t] = (P_j V - P_h V)[t] . u[h, t] to first order. With labels
that the model itself samples, the loss is -log p(label), and half the expected square of the change is the KL
divergence to the unchanged model (the Fisher information): cost of a unit = 1/2 sum_t (sum_h e[h, j_h, t])^2, in nats
a token. If a map is in use already, the divergence from the base has a gradient as well, which gives a signed term of
first order.

If gradients do not fit, u is W_O[h]' z / r with random z ~ N(0, 1). The same sum is then the squared error of the
attention's output, r being the size of the residual stream at that layer, so that layers can be compared.

P_j V is never formed: with M[h] = u[h] V', e[h, j, t] is the product of the rows P_j[t] and M[h][t], and one batched
product over tokens gives all pairs.

Letters in shape comments: T tokens, H heads of a layer, J heads of all layers up to it, K shortlisted sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.sharing_map import Source
from sa_convert.domain.units import Unit, Units

BEAMS = 16
"""Choices of sources for a unit's first heads that are followed further."""


@dataclass(frozen=True)
class Offer:
    """What a treatment would do to a unit.

    cost: nats a token (or relative error). sources: one for each of the unit's heads, or none where it keeps its
    attention. saved: elements of one token's cached keys.
    """

    cost: float
    sources: tuple[Source, ...]
    saved: int


@dataclass
class Costs:
    """Sums over calibration tokens, weighted and divided so that costs are per token.

    shortlist: (H, K) for each layer, the numbers of the best sources of each head, its own among them. second: for each
    unit (heads * K, heads * K), second moments of e over the pairs of its heads and their shortlists, halved. first:
    (heads * K,), the first-order term, 0 without a map. pairs: (H, J) for each layer, the cost of each pair alone.
    without_map: whether they were measured on the base as it is.
    """

    units: Units
    measure: Measure
    shortlist: dict[int, torch.Tensor] = field(default_factory=dict)
    second: dict[Unit, torch.Tensor] = field(default_factory=dict)
    first: dict[Unit, torch.Tensor] = field(default_factory=dict)
    pairs: dict[int, torch.Tensor] = field(default_factory=dict)
    without_map: bool = True

    def best(self, unit: Unit, removed: set[Unit] | frozenset[Unit]) -> Offer | None:
        """The cheapest sources of a unit outside of `removed`, or None where it has none.

        A beam search over the unit's heads, then each head in turn is improved beside the others, on the unit's common
        cost.
        """
        second, heads = self.second[unit], len(unit.heads)
        count = second.shape[0] // heads
        alone = (second.diagonal() + self.first[unit]).view(heads, count).clone()
        for at, head in enumerate(unit.heads):
            alone[at, self._closed(unit, head, removed)] = torch.inf
        if bool(alone.isinf().all(1).any()):
            return None
        chosen = torch.empty(1, 0, dtype=torch.long)  # (beams, heads so far), places in `second`
        cost = torch.zeros(1)
        for at in range(heads):
            rows = second[at * count : (at + 1) * count]  # (K, heads * K)
            beside = 2 * rows[:, chosen].sum(-1).T if at else torch.zeros(1, count)  # (beams, K)
            total = (cost[:, None] + alone[at] + beside).flatten()
            best = total.topk(min(BEAMS, int(total.isfinite().sum())), largest=False, sorted=True)
            chosen = torch.cat([chosen[best.indices // count], (best.indices % count + at * count)[:, None]], dim=1)
            cost = best.values
        places, found = self._improved(second, alone, chosen[0].tolist(), float(cost[0]))
        sources = (self._place(unit, at, place % count) for at, place in enumerate(places))
        return Offer(found, tuple(sources), self.units.keys_of(unit))

    @staticmethod
    def _improved(second: torch.Tensor, alone: torch.Tensor, places: list[int], cost: float) -> tuple[list[int], float]:
        """Change one head at a time while the cost falls. alone (heads, K); places: of each head in `second`."""
        count, improved = alone.shape[1], True
        while improved:
            improved = False
            for at in range(len(places)):
                others = places[:at] + places[at + 1 :]
                beside = alone[at] + 2 * second[at * count : (at + 1) * count][:, others].sum(1)
                place = at * count + int(beside.argmin())
                gain = float(beside[places[at] - at * count] - beside.min())
                if gain > 1e-9 * max(1.0, abs(cost)):
                    places, cost, improved = [*places[:at], place, *places[at + 1 :]], cost - gain, True
        return places, cost

    def value(self, unit: Unit, sources: tuple[Source, ...]) -> float:
        """The cost of a unit with given sources (its own heads: to keep or to get back its attention)."""
        chosen = []
        for head, source in zip(unit.heads, sources, strict=True):
            row = self.shortlist[unit.layer][head].tolist()
            number = self.units.number(source)
            if number not in row:
                return float("inf")
            chosen.append(row.index(number))
        return self._cost(unit, chosen)

    def _closed(self, unit: Unit, head: int, removed: set[Unit] | frozenset[Unit]) -> list[int]:
        """Places in a head's shortlist that cannot be its source."""
        places = (self.units.place(number) for number in self.shortlist[unit.layer][head].tolist())
        return [at for at, place in enumerate(places) if place[0] >= unit.layer or self.units.unit_of(place) in removed]

    def _cost(self, unit: Unit, chosen: list[int]) -> float:
        count = self.second[unit].shape[0] // len(unit.heads)
        at = [head * count + k for head, k in enumerate(chosen)]
        return float(self.second[unit][at][:, at].sum() + self.first[unit][at].sum())

    def _place(self, unit: Unit, at: int, k: int) -> Source:
        return self.units.place(int(self.shortlist[unit.layer][unit.heads[at]][k]))


def shortlists(
    pairs: Mapping[int, torch.Tensor],
    units: Units,
    allowed: Mapping[int, torch.Tensor],
    present: Mapping[int, tuple[Source | None, ...]],
    count: int,
) -> dict[int, torch.Tensor]:
    """(H, K) numbers of sources for each layer: the head's own, the one it has at present, and the cheapest allowed.

    pairs: (H, J) costs. allowed: (J,) whether a head may be a source for the layer. present: rows of the map in use.
    """
    found = {}
    for layer, costs in pairs.items():
        costs = costs.masked_fill(~allowed[layer], float("inf"))
        own = torch.arange(len(costs)) + units.offsets[layer]
        for head, source in enumerate(present.get(layer, ())):
            if source is not None:
                costs[head, units.number(source)] = -float("inf")
        # In the last column of its own, so that a head never takes the place of a source.
        best = costs.argsort(dim=1, stable=True)[:, : min(count, int(allowed[layer].sum()))]
        found[layer] = torch.cat([best, own[:, None]], dim=1)
    return found
