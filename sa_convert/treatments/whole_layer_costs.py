"""What it costs that something else comes in the place of a layer's attention, from one pass over each sequence.

Let d[h, t] be by what the output of head h (before the output projection) changes at token t, and g[h, t] the gradient
of a loss there. To first order the loss changes by e[t] = sum_h d[h, t] . g[h, t], over all heads of the layer, and the
cost is 1/2 sum_t e[t]^2, as for sharing (`sa_convert.treatments.share.cost`).
"""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit, Units
from sa_convert.models.processes import listed, summed
from sa_convert.treatments.ledger import Chosen, Ledger, Move, Observed, Offer
from sa_convert.treatments.window.cost import certain

if TYPE_CHECKING:
    import torch

Change = Callable[[Observed], "torch.Tensor"]
"""By what the outputs (T, H, D) of a layer's heads change."""


class WholeLayerCosts(Ledger):
    """costs: by layer, in nats a token; slopes: likewise, of each sequence, the part of first order, which there is
    under a plan."""

    def __init__(
        self,
        units: Units,
        treatment: str,
        measure: Measure,
        plan: Plan,
        candidates: Collection[Unit],
        *,
        change: Change,
        factor: float,
    ) -> None:
        """candidates: units of the layers on offer. factor: what a cost is when it is measured, to what was estimated,
        on other models."""
        super().__init__(units, treatment, measure, without_plan=not plan)
        self.change, self.factor = change, factor
        self.costs: dict[int, float] = {}
        self.slopes: dict[int, list[float]] = {}
        self.layers: dict[int, tuple[Unit, ...]] = {}
        for unit in candidates:
            self.layers[unit.layer] = (*self.layers.get(unit.layer, ()), unit)

    def add(self, observed: Observed) -> None:
        if observed.layer not in self.layers:
            return
        e = (self.change(observed) * observed.gradient.float()).sum((1, 2)).double()  # (T,)
        if observed.slope:
            # Of random repetition, only what comes with tokens that can be predicted.
            counted = e[:-1][observed.scored[1:]] if observed.repetition else e
            self.slopes.setdefault(observed.layer, []).append(float(counted.sum()) * observed.weight)
        else:
            known = self.costs.get(observed.layer, 0.0)
            self.costs[observed.layer] = known + 0.5 * float(e.square().sum()) * observed.weight

    def join(self, *, screening: bool = False) -> None:
        self.costs, self.slopes = summed(self.costs), listed(self.slopes)

    def cost(self, layer: int) -> float:
        """Of a whole layer."""
        return self.factor * self.costs[layer] + certain(self.slopes.get(layer, []))

    def offer(self, unit: Unit) -> Offer:
        """A unit's part in what is done to its layer."""
        part = self.cost(unit.layer) / len(self.layers[unit.layer]) if unit.layer in self.costs else 0.0
        return Offer(self.treatment, part, self.saved(unit), whole=self.treatment)

    def value(self, unit: Unit, offer: Offer) -> float:
        return self.offer(unit).cost

    def given(self, plan: Plan) -> dict[Unit, Offer]:
        layers = plan.layers_of(self.treatment)
        return {unit: self.offer(unit) for unit in self.units.all if unit.layer in layers}

    def moves(self, state: Chosen) -> Iterator[Move]:
        """Layers none of whose scores others use, but never the last one of its stack that attends."""
        lent = {unit.layer for unit in state.lent}
        gone = {unit.layer for unit, offer in state.chosen.items() if offer.whole}
        for layer in self.costs:
            others = {unit.layer for unit in self.units.all if self._stack(unit.layer) == self._stack(layer)} - {layer}
            if layer not in lent and layer not in gone and others - gone:
                yield state.move({unit: self.offer(unit) for unit in self.layers[layer]})

    def _stack(self, layer: int) -> str:
        return self.units.geometry.layers[layer].stack
