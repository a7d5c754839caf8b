"""What a treatment would cost each unit of a model, and what a search makes of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.geometry import Head
from sa_convert.domain.plan import GroupPlan, Plan
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import SaConvertError
from sa_convert.models.processes import count

if TYPE_CHECKING:
    import torch

    from sa_convert.treatments.trial import Turned

Taken = frozenset[Unit]
"""Units to which something is done so that no other may use their scores."""


@dataclass(frozen=True)
class Observed:
    """One layer in one pass over a sequence: what a ledger is filled from.

    Letters: T tokens, S tokens seen, H query heads of the layer, J those of all layers up to it, G KV groups, D head
    size. probabilities: (T, J, S), 0 for heads of other stacks. value: (G, S, D). output: (T, H, D) of each head.
    gradient: (T, H, D) of a loss at these outputs; slope: whether the loss is the divergence from the base, which
    comes first, or that of labels which the model has drawn. scored: (T,) bool, the tokens whose loss counts.
    repetition: whether the sequence repeats random tokens. weight: of the sequence, over the tokens scored, so that
    sums are per token. states: (T, hidden), what goes into the layer's attention; None if no ledger asks for them.

    query: (H, T, D), scaled, and key: (G, S, D), whose products are scores, turned by position. turned: turns keys
    (., S, D) by their positions, or back.
    """

    layer: int
    probabilities: "torch.Tensor"
    value: "torch.Tensor"
    output: "torch.Tensor"
    gradient: "torch.Tensor"
    slope: bool
    scored: "torch.Tensor"
    repetition: bool
    weight: float
    states: "torch.Tensor | None" = None
    query: "torch.Tensor | None" = None
    key: "torch.Tensor | None" = None
    turned: "Turned | None" = None


@dataclass(frozen=True, kw_only=True)
class Attended:
    """One layer in one pass over a long sequence, whose probabilities are computed block by block when they are needed.

    Letters: T tokens, H query heads of the layer, G KV groups, D head size. blocks: gives, for every block of queries,
    the number of the first of them and their probabilities (H, queries, keys up to the last of them). value: (G, T, D).
    output, gradient, scored, repetition, weight, slope: as in `Observed`. sample: which of the sequences it is.
    """

    layer: int
    blocks: "Callable[[], Iterator[tuple[int, torch.Tensor]]]"
    value: "torch.Tensor"
    output: "torch.Tensor"
    gradient: "torch.Tensor"
    slope: bool
    scored: "torch.Tensor"
    repetition: bool
    weight: float
    sample: int


@dataclass(frozen=True)
class Offer:
    """What a treatment would do to a unit.

    treatment: its name. cost: nats a token (or relative error). saved: elements of one token's cached keys; a search by
    the whole cache asks the answers of the treated KV groups instead. plan:
    treatments and arguments of each of the unit's KV groups. sources: heads whose scores it uses, which then have to
    keep them. lends: whether others may use the scores of the unit nevertheless. whole: the treatment of its whole
    layer, of which this is the unit's part; all units of the layer have such offers, or none; their plan is empty if
    the treatment's name is all that a plan tells of the layer. kind: of the treatment's kinds of offers
    (`Ledger.kinds`), whose estimates err differently; "": it has one.
    """

    treatment: str
    cost: float
    saved: int
    plan: Mapping[int, GroupPlan] = field(default_factory=dict, compare=False)
    sources: tuple[Head, ...] = ()
    lends: bool = False
    whole: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Move:
    """A change of the plan.

    offers: of the moved unit, and of units that lose a source by it. cost: by how much the expected loss rises. saved:
    elements of one token's cached keys, besides those saved already.
    """

    offers: Mapping[Unit, Offer]
    cost: float
    saved: int


class Chosen(Protocol):
    """What a ledger may ask of a search: which units are treated so far."""

    units: Units
    chosen: dict[Unit, Offer]

    @property
    def taken(self) -> Taken: ...

    @property
    def lent(self) -> Taken:
        """Units whose scores others use."""
        ...

    def users_of(self, unit: Unit) -> list[Unit]:
        """Units that use scores of this one."""
        ...

    def best(self, treatment: str, unit: Unit, taken: Taken) -> Offer | None:
        """The cheapest offer of a treatment for a unit, remembered while its sources are not taken."""
        ...

    def move(self, offers: Mapping[Unit, Offer]) -> Move: ...


class Ledger:
    """Costs of one treatment. Filled layer by layer over calibration sequences, then asked for offers.

    units: of the model. treatment: its name. measure: of the costs. without_plan: whether they are those of the base as
    it is, and not of a plan in use.
    """

    screens = False
    """Whether some sequences are shown beforehand, for choices that all others then are measured by."""

    reads_states = False
    """Whether it asks for what goes into each layer's attention."""

    long = False
    """Whether it is filled from long sequences (`attend`) in place of the others."""

    def __init__(self, units: Units, treatment: str, measure: Measure, without_plan: bool = True) -> None:
        self.units, self.treatment, self.measure, self.without_plan = units, treatment, measure, without_plan

    def screen(self, observed: Observed) -> None:
        """A layer of one of these sequences."""

    def screened(self) -> None:
        """After the last of these sequences."""

    def add(self, observed: Observed) -> None:
        """A layer of a sequence."""

    def tested_by(self, periods: Sequence[int]) -> None:
        """Before the first long sequence: after how many tokens each of those repeats that repeat random tokens."""

    def attend(self, attended: Attended) -> None:
        """A layer of a long sequence, of a ledger that asks for these."""

    def join(self, *, screening: bool = False) -> None:
        """After the last sequence: put together what several processes have seen a part of each, with
        `sa_convert.models.processes`. screening: what was shown beforehand, before `screened`."""
        if count() > 1 and (type(self).add is not Ledger.add or type(self).attend is not Ledger.attend):
            raise SaConvertError(f"Costs of '{self.treatment}' cannot be shared among processes: use one process.")

    def close(self) -> None:
        """After the last sequence, which is also that of all processes."""

    def emphasized(self, emphasis: float) -> "Ledger":
        """The same costs, of which those on repetition count more, if they are known apart."""
        return self

    def alternatives(self) -> "Iterator[Ledger]":
        """The same costs with each choice that a plan has to make once for all of its units; by default there is none
        to make."""
        yield self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of offers, for each of which is measured how far its estimate is off."""
        return (self.treatment,)

    def of_kind(self, kind: str) -> "Ledger":
        """The same costs, with offers of one kind."""
        return self

    def best(self, unit: Unit, taken: Taken) -> Offer | None:
        """The cheapest offer for a unit while these are taken, or None if it has none."""
        return None

    def offers(self, unit: Unit, taken: Taken) -> Iterator[Offer]:
        """All offers for a unit while these are taken that may compete: the cheapest of each saving."""
        best = self.best(unit, taken)
        if best is not None:
            yield best

    def value(self, unit: Unit, offer: Offer) -> float:
        """What a unit costs that is treated as an offer has it, under the plan of which costs were measured."""
        best = self.best(unit, frozenset({unit}))
        return offer.cost if best is None else best.cost

    def given_back(self, unit: Unit, offer: Offer) -> float:
        """What a unit costs that is as in the base again, under that plan."""
        return 0.0

    def given(self, plan: Plan) -> dict[Unit, Offer]:
        """The units all of whose KV groups a plan treats so, at no cost."""
        found = {}
        groups = plan.groups_of(self.treatment)
        for unit in self.units.all:
            told = groups.get(unit.layer, {})
            if all(group in told for group in unit.groups):
                parts = {group: {self.treatment: told[group]} for group in unit.groups}
                found[unit] = Offer(self.treatment, 0.0, self.saved(unit), parts)
        return found

    def saved(self, unit: Unit) -> int:
        """Elements of one token's cached keys that a treated unit saves."""
        return self.units.keys_of(unit)

    def moves(self, state: Chosen) -> Iterator[Move]:
        """All that the treatment can do next: to each unit whose scores nobody uses. A unit may give up what it has for
        an offer that saves more; the search passes over all others."""
        for unit in self.units.all:
            for offer in self.offers(unit, state.taken | {unit}):
                if offer.lends or unit not in state.lent:
                    yield state.move({unit: offer})


def plan_of_offers(units: Units, offers: Mapping[Unit, Offer]) -> Plan:
    """The plan in which these units are treated so."""
    layers: dict[int, dict[int, GroupPlan]] = {}
    for unit, offer in offers.items():
        layers.setdefault(unit.layer, {}).update(offer.plan)
    whole = {unit.layer: offer.whole for unit, offer in offers.items() if offer.whole and not offer.plan}
    return Plan({**layers, **whole}, units.geometry.stacks)


def users_of(units: Units, unit: Unit, offers: Mapping[Unit, Offer]) -> list[Unit]:
    """The units whose offers use scores of `unit`."""
    return [user for user, offer in offers.items() if any(units.unit_of(head) == unit for head in offer.sources)]


def units_of(units: Units, heads: Iterable[Head]) -> Taken:
    """The units that these heads belong to."""
    return frozenset(units.unit_of(head) for head in heads)
