"""Which units are treated, and how: greedy by cost, and measured again as units go.

Each treatment has a ledger (`sa_convert.treatments.ledger`), which offers to treat a unit for a cost and a saving. The
search takes the move that saves the most for its cost.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from itertools import starmap
from math import isfinite

from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit
from sa_convert.search.accounting import Accounting, Keys
from sa_convert.treatments.ledger import Ledger, Move, Offer, Taken, plan_of_offers, units_of, users_of


class State:
    """Units that are treated so far, under costs that were measured at some plan."""

    def __init__(
        self,
        ledgers: Mapping[str, Ledger],
        plan: Plan | None = None,
        account: Accounting | None = None,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        """ledgers: by treatment; filled at `plan`, so that it costs nothing more, or without any plan. account: in what
        savings are counted; None: keys. factors: of the costs of each kind of offer; others have 1."""
        self.ledgers = ledgers
        self.units = next(iter(ledgers.values())).units
        self.account, self.factors = account or Keys(self.units), factors or {}
        self._barred: dict[Unit, int] = {}
        self.chosen: dict[Unit, Offer] = {}
        for ledger in ledgers.values():
            for unit, offer in ledger.given(plan or Plan()).items():
                cost = ledger.value(unit, offer) if ledger.without_plan else 0.0
                self.chosen[unit] = replace(offer, cost=cost if isfinite(cost) else 0.0)
        self._start = self.estimate
        self._best: dict[tuple[str, Unit], Offer] = {}

    @property
    def taken(self) -> Taken:
        """Units that are treated so that no other may use their scores."""
        return frozenset(unit for unit, offer in self.chosen.items() if not offer.lends)

    @property
    def lent(self) -> Taken:
        """Units whose scores others use, which are left as they are."""
        return units_of(self.units, (head for offer in self.chosen.values() for head in offer.sources))

    @property
    def plan(self) -> Plan:
        return plan_of_offers(self.units, self.chosen)

    @property
    def removed(self) -> float:
        """The part that is saved of what the account counts."""
        return sum(self.account.saved(unit, offer) for unit, offer in self.chosen.items()) / self.account.total

    @property
    def estimate(self) -> float:
        """The expected rise of the loss over that of the model whose costs were measured."""
        return sum(self.cost(offer) for offer in self.chosen.values())

    @property
    def rise(self) -> float:
        """The expected rise of the loss since the start."""
        return self.estimate - self._start

    def users_of(self, unit: Unit) -> list[Unit]:
        """The units that use scores of this one."""
        return users_of(self.units, unit, self.chosen)

    def cost(self, offer: Offer) -> float:
        return offer.cost * self.factors.get(offer.kind or offer.treatment, 1.0)

    def bar(self, unit: Unit) -> None:
        """From now on the unit gets nothing that saves more than what it has."""
        self._barred[unit] = self.account.saved(unit, self.chosen[unit]) if unit in self.chosen else 0

    def bar_as(self, other: "State") -> None:
        """Bar what another state has barred."""
        self._barred.update(other._barred)

    def undo(self, unit: Unit, accepted: Mapping[Unit, Offer]) -> None:
        """Give a unit what it had before, for good; with all of its layer, if the layer is treated as a whole."""
        whole = self.chosen[unit].whole
        for other in [other for other in self.chosen if other == unit or (whole and other.layer == unit.layer)]:
            del self.chosen[other]
            if other in accepted:
                self.chosen[other] = accepted[other]
            self.bar(other)

    def copy(self) -> "State":
        """The same, to go on from."""
        other = copy(self)
        other.chosen, other._best, other._barred = dict(self.chosen), dict(self._best), dict(self._barred)
        return other

    def _may(self, move: Move) -> bool:
        """Whether it saves anything, nothing in it is barred, and no layer that is treated as a whole is divided."""
        saved, whole = self.account.saved, {unit.layer for unit, offer in self.chosen.items() if offer.whole}
        return move.saved > 0 and not any(
            (unit in self._barred and saved(unit, offer) > self._barred[unit])
            or (unit.layer in whole and not offer.whole)
            for unit, offer in move.offers.items()
        )

    def move(self, offers: Mapping[Unit, Offer]) -> Move:
        """The move to these offers, from what their units have at present."""
        count, before = self.account.saved, {unit: self.chosen[unit] for unit in offers if unit in self.chosen}
        cost = sum(map(self.cost, offers.values())) - sum(map(self.cost, before.values()))
        saved = sum(starmap(count, offers.items())) - sum(starmap(count, before.items()))
        return Move(offers, cost, saved)

    def best(self, treatment: str, unit: Unit, taken: Taken) -> Offer | None:
        """`Ledger.best`. The best offer of before is still the best while its sources are there."""
        known = self._best.get((treatment, unit))
        if known is not None and not units_of(self.units, known.sources) & taken:
            return known
        offer = self.ledgers[treatment].best(unit, taken)
        if offer is not None:
            self._best[treatment, unit] = offer
        return offer

    def advance(self) -> bool:
        """Take the move that costs least for what it saves. False: there is none."""
        moves = [move for ledger in self.ledgers.values() for move in ledger.moves(self) if self._may(move)]
        if not moves:
            return False
        # For equal costs the first in the order of units, so that a search can be repeated.
        best = min(moves, key=lambda move: (move.cost / move.saved, min(move.offers)))
        self.chosen.update(best.offers)
        return True

    def extend(self, part: float) -> bool:
        """Take moves until `part` is saved. False: there are no more."""
        while self.removed < part - 1e-9:
            if not self.advance():
                return False
        return True

    def rematch(self, least: float = 1e-5) -> int:
        """Treat units otherwise by the same treatment if that is cheaper under these costs, by more than `least`;
        return how many."""
        taken, changed = self.taken, 0
        for unit in sorted(self.chosen):
            offer = self.ledgers[self.chosen[unit].treatment].best(unit, taken)
            if offer is not None and offer.cost < self.chosen[unit].cost - least:
                self.chosen[unit] = offer
                changed += 1
        return changed

    def give_back(self, unit: Unit) -> float:
        """By how much the expected loss changes if a unit is as in the base again."""
        offer = self.chosen[unit]
        return self.ledgers[offer.treatment].given_back(unit, offer) - offer.cost

    def swap(self, least: float = 1e-4) -> bool:
        """Give one unit back and take another for it, if the expected loss falls by more than `least`."""
        taken, lent = self.taken, self.lent
        offers = [
            (offer.cost, unit, offer)
            for ledger in self.ledgers.values()
            for unit in self.units.all
            # A source's users would change as well, which these costs do not cover.
            if unit not in self.chosen and unit not in lent and (offer := ledger.best(unit, taken | {unit}))
        ]
        if not offers or not self.chosen:
            return False
        alone = [unit for unit, offer in self.chosen.items() if not offer.whole]
        if not alone:
            return False
        gain, back = min((self.give_back(unit), unit) for unit in alone)
        fitting = [found for found in offers if found[2].saved == self.chosen[back].saved]
        if not fitting:
            return False
        cost, unit, offer = min(fitting, key=lambda found: found[:2])
        if gain + cost > -least:
            return False
        del self.chosen[back]
        self._best.clear()  # the unit given back may be a better source than those remembered
        self.chosen[unit] = self.ledgers[offer.treatment].best(unit, self.taken | {unit}) or offer
        return True
