"""What fewer KV groups in a layer would cost, from one pass over each sequence.

By what the outputs of heads change is computed in full: scores of merged keys, their softmax, and merged values. Then
it costs what any change of a layer's outputs does (`sa_convert.treatments.whole_layer_costs`).
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit, Units
from sa_convert.treatments.ledger import Chosen, Ledger, Move, Observed, Offer
from sa_convert.treatments.merge.bases import Merged
from sa_convert.treatments.merge.learned import learned
from sa_convert.treatments.merge.rules import NAME, choices, merged_layers, refusal
from sa_convert.treatments.merge.trying import in_parts
from sa_convert.treatments.whole_layer_costs import WholeLayerCosts

if TYPE_CHECKING:
    import torch

FACTOR = 1.8
"""What it costs, to what is estimated, on SmolLM2-135M: of plans with six and with nine layers."""


class MergeCosts(Ledger):
    """left: for each number of KV groups that layers could have left, the costs of those layers."""

    def __init__(self, units: Units, measure: Measure, plan: Plan) -> None:
        super().__init__(units, NAME, measure, without_plan=not plan)
        layers = units.geometry.layers
        self.merged = merged_layers(plan)
        candidates = [unit for unit in units.all if refusal(units.geometry, unit.layer) is None]
        numbers = sorted({number for unit in candidates for number in choices(layers[unit.layer])})
        self.left = {
            number: WholeLayerCosts(
                units,
                NAME,
                measure,
                plan,
                [unit for unit in candidates if number in choices(layers[unit.layer])],
                change=partial(self._change, number),
                factor=FACTOR,
            )
            for number in numbers
        }

    def _change(self, number: int, observed: Observed) -> "torch.Tensor":
        if self.merged.get(observed.layer, number + 1) <= number:  # it is so already
            return observed.output.float() * 0
        return change_of_heads(observed, learned().merged(observed.layer, number))

    def add(self, observed: Observed) -> None:
        for costs in self.left.values():
            costs.add(observed)

    def join(self, *, screening: bool = False) -> None:
        for costs in self.left.values():
            costs.join(screening=screening)

    def saved(self, unit: Unit, number: int = 1) -> int:
        """Elements of one token's cached keys that a unit saves in a layer with so many KV groups left."""
        each = self.units.geometry.layers[unit.layer].groups // number
        return self.units.geometry.keys(unit.layer, sum(group % each != 0 for group in unit.groups))

    def offer(self, unit: Unit, number: int) -> Offer:
        """A unit's part in leaving its layer so many KV groups."""
        parts = {group: {NAME: {"groups": number}} for group in unit.groups}
        cost = self.left[number].offer(unit).cost
        return Offer(NAME, cost, self.saved(unit, number), parts, whole=NAME)

    def value(self, unit: Unit, offer: Offer) -> float:
        return self.offer(unit, _number_of(offer)).cost

    def given(self, plan: Plan) -> dict[Unit, Offer]:
        merged = merged_layers(plan)
        return {unit: self.offer(unit, merged[unit.layer]) for unit in self.units.all if unit.layer in merged}

    def moves(self, state: Chosen) -> Iterator[Move]:
        """Layers none of whose scores others use, to fewer KV groups than they have."""
        lent = {unit.layer for unit in state.lent}
        gone = {unit.layer for unit, offer in state.chosen.items() if offer.whole and offer.treatment != NAME}
        for number, costs in self.left.items():
            for layer in costs.costs:
                if layer not in lent and layer not in gone:
                    yield state.move({unit: self.offer(unit, number) for unit in costs.layers[layer]})


def change_of_heads(observed: Observed, parts: tuple[Merged, ...]) -> "torch.Tensor":
    """By what the outputs (T, H, D) of a layer's heads change, if these parts make its keys and values.

    Probabilities p of scores that change by d become p exp(d) over their sum, and what is missing of 1, which
    attention sinks have.
    """
    import torch

    assert observed.query is not None
    assert observed.key is not None
    key, value = observed.key.float(), observed.value.float()
    query, size = observed.query.float(), len(observed.query) // len(key)
    moved = in_parts(parts, key[None], Merged.keys)[0] - key
    change = torch.matmul(query, moved.repeat_interleave(size, 0).transpose(1, 2))  # (H, T, S)
    own = observed.probabilities[:, -len(query) :].transpose(0, 1).float()
    rest = (1 - own.sum(-1, keepdim=True)).clamp(min=0)
    change = change.masked_fill(own == 0, float("-inf"))
    most = change.amax(-1, keepdim=True).clamp(min=0)
    raised = own * (change - most).exp()
    made = raised / (raised.sum(-1, keepdim=True) + rest * (-most).exp())
    values = in_parts(parts, value[None], Merged.values)[0].repeat_interleave(size, 0)
    return torch.matmul(made, values).transpose(0, 1) - observed.output.float()


def _number_of(offer: Offer) -> int:
    number: int = next(iter(offer.plan.values()))[NAME]["groups"]
    return number
