"""What it costs a head to use another head's probabilities, for all pairs, from one pass over each sequence.

Let u[h, t] be the gradient of a loss at the output of head h (before the output projection) at token t. Giving head h
the probabilities of head j changes the loss by e[h, j, t] = (P_j V - P_h V)[t] . u[h, t] to first order. With labels
that the model itself samples, the loss is -log p(label), and half the expected square of the change is the KL
divergence to the unchanged model (the Fisher information): cost of a unit = 1/2 sum_t (sum_h e[h, j_h, t])^2, in nats
a token. If a plan is in use already, the divergence from the base has a gradient as well, which gives a signed term of
first order.

If gradients do not fit, u is W_O[h]' z / r with random z ~ N(0, 1). The same sum is then the squared error of the
attention's output, r being the size of the residual stream at that layer, so that layers can be compared.

P_j V is never formed: with M[h] = u[h] V', e[h, j, t] is the product of the rows P_j[t] and M[h][t], and one batched
product over tokens gives all pairs.

Letters in shape comments: T tokens, H heads of a layer, J heads of all layers up to it, K shortlisted sources.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.geometry import Head
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit, Units
from sa_convert.models.processes import listed, summed
from sa_convert.treatments.ledger import Chosen, Ledger, Move, Observed, Offer, Taken
from sa_convert.treatments.share.plans import NAME, map_of, plan_of_unit
from sa_convert.treatments.share.rules import layer_difference

if TYPE_CHECKING:
    import torch

BEAMS = 16
"""Choices of sources for a unit's first heads that are followed further."""


SHORTLIST = 24
"""Sources that are kept for each head. More changed no choice on SmolLM2-135M."""


class ShareCosts(Ledger):
    """Sums over calibration tokens, weighted and divided so that costs are per token.

    shortlist: (H, K) for each layer, the numbers of the best sources of each head, its own among them. second: for each
    unit (heads * K, heads * K), second moments of e over the pairs of its heads and their shortlists, halved. first:
    (heads * K,), the first-order term, 0 without a plan. pairs: (H, J) for each layer, the cost of each pair alone.

    A unit that the plan shares already is costed too: with other sources, and with its own attention again.
    """

    def __init__(
        self, units: Units, measure: Measure, plan: Plan | None = None, known: "ShareCosts | None" = None
    ) -> None:
        """known: costs whose pairs choose the shortlists, instead of a first look at some sequences."""
        super().__init__(units, NAME, measure, without_plan=not plan)
        self.plan, self.screens = plan or Plan(stacks=units.geometry.stacks), known is None
        self.shortlist: dict[int, torch.Tensor] = {}
        self.second: dict[Unit, torch.Tensor] = {}
        self.first: dict[Unit, torch.Tensor] = {}
        self.pairs: dict[int, torch.Tensor] = {} if known is None else known.pairs
        self._slopes: dict[Unit, list[torch.Tensor]] = {}
        self._first: dict[int, torch.Tensor] = {}  # (J, H) of the sequence that is being seen
        if known is not None:
            self.screened()

    @cached_property
    def allowed(self) -> "dict[int, torch.Tensor]":
        """(J,) bool for each layer that can share: whether a head of this or an earlier layer may be a source."""
        masks = {layer: _allowed(self.units, layer, self.plan) for layer in range(len(self.units.geometry.layers))}
        return {layer: mask for layer, mask in masks.items() if bool(mask.any())}

    def screen(self, observed: Observed) -> None:
        if (found := self._changes(observed)) is not None:
            changes, first = found
            pairs = changes.square().sum(0).mul_(0.5).add_(first).T.mul(observed.weight)
            known = self.pairs.get(observed.layer)
            self.pairs[observed.layer] = pairs if known is None else known + pairs

    def screened(self) -> None:
        shared = map_of(self.plan, self.units.geometry).layers
        self.shortlist = shortlists(self.pairs, self.units, self.allowed, shared, SHORTLIST)

    def add(self, observed: Observed) -> None:
        if (found := self._changes(observed)) is not None:
            for unit in (unit for unit in self.units.all if unit.layer == observed.layer):
                second, slope = self._moments(unit, *found)
                self.second[unit] = self.second.get(unit, 0.0) + second * observed.weight
                self._slopes.setdefault(unit, []).append(slope * observed.weight)

    def join(self, *, screening: bool = False) -> None:
        if screening:
            self.pairs = summed(self.pairs)
        else:
            self.second, self._slopes = summed(self.second), listed(self._slopes)

    def close(self) -> None:
        import torch

        self.first = {unit: _certain(torch.stack(found)) for unit, found in self._slopes.items()}

    def _changes(self, observed: Observed) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """e (T, J, H) and the summed first-order term (J, H); None before it is complete, and for other layers."""
        import torch

        if observed.layer not in self.allowed:
            return None
        e = changes_of(observed)
        if observed.slope:
            # Of random repetition, only what comes with tokens that can be predicted.
            self._first[observed.layer] = (e[:-1][observed.scored[1:]] if observed.repetition else e).sum(0)
            return None
        return e, self._first.pop(observed.layer, torch.zeros(e.shape[1:]))

    def _moments(
        self, unit: Unit, changes: "torch.Tensor", first: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Half the second moments, and the first-order term, over a unit's shortlist. changes: (T, J, H); first:
        (J, H)."""
        import torch

        short = self.shortlist[unit.layer]
        e = torch.cat([changes[:, short[head], head] for head in unit.heads], dim=1)  # (T, heads * K)
        return (e.T @ e).mul_(0.5), torch.cat([first[short[head], head] for head in unit.heads])

    def moves(self, state: Chosen) -> Iterator[Move]:
        """A unit's heads use the attention of other heads, and those that used its own find others."""
        for unit in self.units.all:
            shares = unit in state.chosen and state.chosen[unit].treatment == self.treatment
            if shares or unit not in self.second or not self.units.keys_of(unit):
                continue
            after, offers = state.taken | {unit}, {}
            for moved in (unit, *state.users_of(unit)):
                offer = state.best(self.treatment, moved, after)
                if offer is None:
                    break
                offers[moved] = offer
            else:
                yield state.move(offers)

    def offer(self, unit: Unit, cost: float, sources: tuple[Head, ...]) -> Offer:
        """With these sources, one for each of the unit's heads."""
        plan = plan_of_unit(unit, sources, self.units.geometry)
        return Offer(self.treatment, cost, self.units.keys_of(unit), plan, sources)

    def given(self, plan: Plan) -> dict[Unit, Offer]:
        """The units all of whose heads share."""
        shared, found = map_of(plan, self.units.geometry), {}
        for unit in self.units.all:
            row = shared.layers.get(unit.layer)
            sources = tuple(source for head in unit.heads if row is not None and (source := row[head]) is not None)
            if len(sources) == len(unit.heads):
                found[unit] = self.offer(unit, 0.0, sources)
        return found

    def value(self, unit: Unit, offer: Offer) -> float:
        return self.value_with(unit, offer.sources)

    def given_back(self, unit: Unit, offer: Offer) -> float:
        return self.value_with(unit, tuple((unit.layer, head) for head in unit.heads))

    def best(self, unit: Unit, taken: Taken) -> Offer | None:
        """The cheapest sources of a unit outside of `taken`, or None if it has none.

        A beam search over the unit's heads, then each head in turn is improved beside the others, on the unit's common
        cost.
        """
        import torch

        if unit not in self.second:
            return None
        second, heads = self.second[unit], len(unit.heads)
        count = second.shape[0] // heads
        alone = (second.diagonal() + self.first[unit]).view(heads, count).clone()
        for at, head in enumerate(unit.heads):
            alone[at, self._closed(unit, head, taken)] = torch.inf
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
        return self.offer(unit, found, tuple(sources))

    @staticmethod
    def _improved(
        second: "torch.Tensor", alone: "torch.Tensor", places: list[int], cost: float
    ) -> tuple[list[int], float]:
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

    def value_with(self, unit: Unit, sources: tuple[Head, ...]) -> float:
        """The cost of a unit with given sources (its own heads: to keep or to get back its attention)."""
        chosen = []
        for head, source in zip(unit.heads, sources, strict=True):
            row = self.shortlist[unit.layer][head].tolist()
            number = self.units.number_of(source)
            if number not in row:
                return float("inf")
            chosen.append(row.index(number))
        return self._cost(unit, chosen)

    def _closed(self, unit: Unit, head: int, taken: Taken) -> list[int]:
        """Places in a head's shortlist that cannot be its source."""
        places = (self.units.head(number) for number in self.shortlist[unit.layer][head].tolist())
        return [at for at, place in enumerate(places) if place[0] >= unit.layer or self.units.unit_of(place) in taken]

    def _cost(self, unit: Unit, chosen: list[int]) -> float:
        count = self.second[unit].shape[0] // len(unit.heads)
        at = [head * count + k for head, k in enumerate(chosen)]
        return float(self.second[unit][at][:, at].sum() + self.first[unit][at].sum())

    def _place(self, unit: Unit, at: int, k: int) -> Head:
        return self.units.head(int(self.shortlist[unit.layer][unit.heads[at]][k]))


def shortlists(
    pairs: "Mapping[int, torch.Tensor]",
    units: Units,
    allowed: "Mapping[int, torch.Tensor]",
    present: Mapping[int, tuple[Head | None, ...]],
    count: int,
) -> "dict[int, torch.Tensor]":
    """(H, K) numbers of sources for each layer: the head's own, the one it has at present, and the cheapest allowed.

    pairs: (H, J) costs. allowed: (J,) whether a head may be a source for the layer. present: of the map in use.
    """
    import torch

    found = {}
    for layer, costs in pairs.items():
        costs = costs.masked_fill(~allowed[layer], float("inf"))
        own = torch.arange(len(costs)) + units.offsets[layer]
        for head, source in enumerate(present.get(layer, ())):
            if source is not None:
                costs[head, units.number_of(source)] = -float("inf")
        # In the last column of its own, so that a head never takes the place of a source.
        best = costs.argsort(dim=1, stable=True)[:, : min(count, int(allowed[layer].sum()))]
        found[layer] = torch.cat([best, own[:, None]], dim=1)
    return found


def changes_of(observed: Observed) -> "torch.Tensor":
    """e (T, J, H) of one layer."""
    import torch

    gradient = observed.gradient.float()
    value = observed.value.float().repeat_interleave(gradient.shape[1] // observed.value.shape[0], dim=0)  # (H, S, D)
    products = torch.matmul(gradient.transpose(0, 1), value.transpose(1, 2))  # (H, T, S)
    e: torch.Tensor = torch.bmm(observed.probabilities, products.permute(1, 2, 0).contiguous())
    return e.sub_((observed.output.float() * gradient).sum(-1)[:, None])


def _certain(slopes: "torch.Tensor") -> "torch.Tensor":
    """The sum of slopes (samples, n) over samples, a standard error nearer to 0.

    A search picks what looks best among thousands of choices; with few samples that is mostly what is noisiest.
    """
    count, total = len(slopes), slopes.sum(0)
    if count < 2:
        return total
    error = slopes.std(0) * count**0.5
    certain: torch.Tensor = total.sign() * (total.abs() - error).clamp(min=0)
    return certain


def _allowed(units: Units, layer: int, plan: Plan) -> "torch.Tensor":
    """(J,) bool: whether a head of this or an earlier layer may be a source for the layer, under a plan."""
    import torch

    layers, shared = units.geometry.layers, map_of(plan, units.geometry).layers
    allowed = torch.zeros(units.offsets[layer + 1], dtype=torch.bool)
    for source in range(layer):
        if layer_difference(layers[source], layers[layer]) is None:
            row = shared.get(source, (None,) * layers[source].heads)
            allowed[units.offsets[source] : units.offsets[source + 1]] = torch.tensor([head is None for head in row])
    return allowed
