"""Which units give up their attention, and what their heads reuse: greedy by cost, and measured again as units go.

A *treatment* is what may be done to a unit: today it keeps its keys or shares. Each treatment offers itself for a unit
with its cost and what it saves, and the search takes the offer that saves the most for its cost; another treatment
(such as keys of low rank) is one more `Moves`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

from sa_convert.domain.sharing_map import SharingMap, Source
from sa_convert.domain.units import Unit
from sa_convert.search.costs import Costs, Offer


@dataclass(frozen=True)
class Move:
    """A change of the plan.

    offers: of the moved unit, and of units that lose a source by it. cost: by how much the expected loss rises. saved:
    elements of one token's cached keys, besides those saved already.
    """

    offers: "dict[Unit, Offer]"
    cost: float
    saved: int


class Moves(Protocol):
    """Something that can be done to a unit to save keys."""

    def moves(self, state: "State") -> Iterator[Move]:
        """All that it can do next."""
        ...


class SharingMoves:
    """A unit's heads reuse the attention of other heads, and all of its keys go."""

    def moves(self, state: "State") -> Iterator[Move]:
        removed = state.sharing_units
        for unit in state.costs.second:
            if unit in removed or not state.units.keys_of(unit):
                continue
            after = removed | {unit}
            offers = {}
            for moved in (unit, *state.units.users_of(unit, state.sources)):
                offer = state.best(moved, after)
                if offer is None:
                    break
                offers[moved] = offer
            else:
                yield state.move(offers)


class State:
    """Units that share so far, under costs that were measured at some map."""

    def __init__(self, costs: Costs, sharing: SharingMap, treatments: tuple[Moves, ...] = (SharingMoves(),)) -> None:
        """costs: measured at `sharing`, so that it costs nothing more, or without any map."""
        self.costs, self.units, self.treatments = costs, costs.units, treatments
        given = self.units.from_map(sharing)
        values = {unit: costs.value(unit, sources) if costs.without_map else 0.0 for unit, sources in given.items()}
        self.chosen = {
            unit: Offer(values[unit] if isfinite(values[unit]) else 0.0, sources, self.units.keys_of(unit))
            for unit, sources in given.items()
        }
        self._start = self.estimate
        self._best: dict[Unit, Offer] = {}

    @property
    def sources(self) -> dict[Unit, tuple[Source, ...]]:
        return {unit: offer.sources for unit, offer in self.chosen.items() if offer.sources}

    @property
    def sharing_units(self) -> frozenset[Unit]:
        """Units that share, so that no other may have its source in them."""
        return frozenset(self.sources)

    @property
    def sharing(self) -> SharingMap:
        return self.units.to_map(self.sources)

    @property
    def removed(self) -> float:
        """The part of the key cache that is saved."""
        return sum(offer.saved for offer in self.chosen.values()) / self.units.all_keys

    @property
    def estimate(self) -> float:
        """The expected rise of the loss over that of the model whose costs were measured."""
        return sum(offer.cost for offer in self.chosen.values())

    @property
    def rise(self) -> float:
        """The expected rise of the loss since the start."""
        return self.estimate - self._start

    def move(self, offers: "dict[Unit, Offer]") -> Move:
        """The move to these offers, from what their units have at present."""
        before = [self.chosen[unit] for unit in offers if unit in self.chosen]
        cost = sum(offer.cost for offer in offers.values()) - sum(offer.cost for offer in before)
        saved = sum(offer.saved for offer in offers.values()) - sum(offer.saved for offer in before)
        return Move(offers, cost, saved)

    def best(self, unit: Unit, removed: frozenset[Unit]) -> Offer | None:
        """`Costs.best`. The best offer of before is still the best while its sources are there."""
        known = self._best.get(unit)
        if known is not None and not any(self.units.unit_of(source) in removed for source in known.sources):
            return known
        offer = self.costs.best(unit, removed)
        if offer is not None:
            self._best[unit] = offer
        return offer

    def advance(self) -> bool:
        """Take the move that costs least for what it saves. False: there is none."""
        moves = [move for treatment in self.treatments for move in treatment.moves(self)]
        if not moves:
            return False
        # For equal costs the first in the order of units, so that a search can be repeated.
        best = min(moves, key=lambda move: (move.cost / move.saved, min(move.offers)))
        self.chosen.update(best.offers)
        return True

    def extend(self, part: float) -> bool:
        """Take moves until `part` of the key cache is saved. False: there are no more."""
        while self.removed < part - 1e-9:
            if not self.advance():
                return False
        return True

    def rematch(self, least: float = 1e-5) -> int:
        """Give units other sources where that is cheaper under these costs, by more than `least`; return how many."""
        removed, changed = self.sharing_units, 0
        for unit in sorted(removed):
            offer = self.costs.best(unit, removed)
            if offer is not None and offer.cost < self.chosen[unit].cost - least:
                self.chosen[unit] = offer
                changed += 1
        return changed

    def give_back(self, unit: Unit) -> float:
        """By how much the expected loss changes where a unit gets its own attention again."""
        own = tuple((unit.layer, head) for head in unit.heads)
        return self.costs.value(unit, own) - self.chosen[unit].cost

    def swap(self, least: float = 1e-4) -> bool:
        """Give one unit back and take another for it, where the expected loss falls by more than `least`."""
        lent = {self.units.unit_of(source) for offer in self.chosen.values() for source in offer.sources}
        removed = self.sharing_units
        taken = [
            (offer.cost, unit, offer)
            for unit in self.costs.second
            # A source's users would change as well, which these costs do not cover.
            if unit not in removed and unit not in lent and (offer := self.costs.best(unit, removed | {unit}))
        ]
        if not taken or not removed:
            return False
        gain, back = min((self.give_back(unit), unit) for unit in removed)
        fitting = [found for found in taken if self.units.keys_of(found[1]) == self.units.keys_of(back)]
        if not fitting:
            return False
        cost, unit, offer = min(fitting, key=lambda found: found[:2])
        if gain + cost > -least:
            return False
        del self.chosen[back]
        self._best.clear()  # the unit given back may be a better source than those remembered
        self.chosen[unit] = self.costs.best(unit, self.sharing_units | {unit}) or offer
        return True
