"""What a search saves: elements of one token's keys, or of the whole cache at a length."""

from collections.abc import Iterable
from functools import cached_property
from typing import Protocol

from sa_convert.domain.plan import GroupPlan, Plan
from sa_convert.domain.units import Unit, Units
from sa_convert.treatments.ledger import Offer
from sa_convert.treatments.plan_answers import layer_answers


class Accounting(Protocol):
    """In what a search counts."""

    units: Units

    @property
    def total(self) -> int:
        """Of the model as it is."""
        ...

    def saved(self, unit: Unit, offer: Offer) -> int:
        """By an offer for a unit to which nothing else is done."""
        ...


class Keys:
    """Elements of one token's cached keys."""

    def __init__(self, units: Units) -> None:
        self.units = units

    @property
    def total(self) -> int:
        return self.units.all_keys

    def saved(self, unit: Unit, offer: Offer) -> int:
        return offer.saved


class WholeCache:
    """Elements of all keys and values that are cached after `tokens` tokens."""

    def __init__(self, units: Units, tokens: int) -> None:
        self.units, self.tokens = units, tokens
        self._known: dict[tuple[Unit, str], int] = {}

    @cached_property
    def total(self) -> int:
        return sum(self._elements(unit, {}) for unit in self.units.all)

    def saved(self, unit: Unit, offer: Offer) -> int:
        key = unit, repr({group: sorted(told.items()) for group, told in offer.plan.items()} or offer.whole)
        if key not in self._known:
            self._known[key] = self._elements(unit, {}) - self._elements(unit, offer.plan or offer.whole)
        return self._known[key]

    def removed(self, plan: Plan) -> float:
        """The part of the cache that a plan saves, whole layers included."""
        geometry = self.units.geometry
        left = sum(self._of_layer(plan, layer, range(geometry.layers[layer].groups)) for layer in self._layers)
        return 1 - left / self.total

    @property
    def _layers(self) -> Iterable[int]:
        return (index for index, layer in enumerate(self.units.geometry.layers) if layer.heads)

    def _elements(self, unit: Unit, planned: "dict[int, GroupPlan] | object") -> int:
        plan = Plan({unit.layer: planned}, self.units.geometry.stacks)  # type: ignore[dict-item]
        return self._of_layer(plan, unit.layer, unit.groups)

    def _of_layer(self, plan: Plan, index: int, groups: Iterable[int]) -> int:
        """What these KV groups of a layer cache."""
        if not self.units.geometry.layers[index].cached:
            return 0
        answers = layer_answers(plan, self.units.geometry, index)
        return sum(answers[group].cached(self.tokens) for group in groups)
