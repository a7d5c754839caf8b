"""The search for a part of the whole cache: treatments of all kinds compete for what each KV group saves at a length.

Costs are estimated once for all offers, and measured where the estimate is known to fail: the units that retrieve most
are treated one by one, each kind of treatment as a whole. Then plans are measured on held-out long text and
on held-out repetition. One that raises the loss of copying beyond the limit is refused, and others are tried.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import inf
from typing import TYPE_CHECKING

from sa_convert.console.progress import announce
from sa_convert.domain.calibrated import Distance
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit
from sa_convert.errors import RecipeError
from sa_convert.observe.sequences import REPETITION_WEIGHT, Sample
from sa_convert.observe.tried import Reference
from sa_convert.search.accounting import WholeCache
from sa_convert.search.budget import more_than_the_cache
from sa_convert.search.choose import NOTHING, Step, some
from sa_convert.search.retrieving import measure_retrieval
from sa_convert.search.rounds import State
from sa_convert.search.scoring import Ledgers, collect
from sa_convert.search.within import longest
from sa_convert.treatments.ledger import Ledger, Offer
from sa_convert.treatments.window.cost import WindowCosts

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Recipe
    from sa_convert.observe.session import Session

SAMPLES, SCREENED = 6, 2
"""Short sequences whose costs are measured, for treatments that do not ask for long ones (under a plan half as many),
and those of text that are shown to them beforehand."""

TRIED = 0.08
"""Part of the cache that a kind of treatment saves when its factor is measured, at the most."""

FACTORS = (0.5, 8.0)
"""What a kind's measured and estimated cost may be to each other."""

SHARE = 0.7
"""Part of the limit on copying that a plan of the search may take, since validation copies at other distances."""

EMPHASES = (1.0, 4.0)
"""What repetition counts in costs of long sequences beside what it counts in those of short ones: at first, and after a
plan that was refused. The more it counts, the more text costs: with 16, the divergence of SmolLM2-135M at half of the
cache is twice that with 1, and copying is no better for it."""

BACK_OFFS = 3
"""How often units get back what they had."""

AGAIN = 0.25
"""Part of the cache before its budget at which costs are measured again."""

FINEST = 0.01
"""Part of the cache by which plans differ that are measured for a limit on perplexity."""

GIVEN_BACK = 3
"""Units that get back what they had after a plan that was refused."""


@dataclass(frozen=True)
class Priced:
    """What a search goes by. ledgers: costs by treatment, without a plan. factors: of each, as measured. account: of
    savings at a length. reference: of the held-out samples. again: measures costs under a plan, in a round by its
    number; None: they are what they are."""

    ledgers: Ledgers
    factors: Mapping[str, float]
    account: WholeCache
    reference: Reference
    again: Callable[[Plan, int], Ledgers] | None = None

    def alternatives(self) -> "list[Priced]":
        """One for each choice that a plan makes once for all of its units, such as one length for all windows."""
        found: list[dict[str, Ledger]] = [{}]
        for name, ledger in self.ledgers.items():
            found = [{**known, name: other} for known in found for other in ledger.alternatives()]
        again: Callable[..., Ledgers] | None = self.again
        return [replace(self, ledgers=ledgers, again=again and partial(again, known=ledgers)) for ledgers in found]

    def state(self, plan: Plan = NOTHING, ledgers: Ledgers | None = None, emphasis: float = 1.0) -> State:
        """The state at a plan. ledgers: costs that were measured again. emphasis: of repetition."""
        measured = self.ledgers if ledgers is None else ledgers
        emphasized = {name: measured[name].emphasized(emphasis) for name in self.ledgers}
        return State(emphasized, plan, self.account, self.factors)


def priced(session: "Session", tokens: int) -> Priced:
    """Everything that is measured before the first choice. tokens: the length at which the cache counts."""
    ledgers = _costs(session)
    account = WholeCache(session.units, tokens)
    windows = ledgers.get("window")
    if isinstance(windows, WindowCosts):
        measure_retrieval(session, windows)
    held_out = session.long.held_out if session.long else session.samples.held_out
    reference = Reference(session.probe, held_out)
    factors = _factors(ledgers, account, reference)
    return Priced(ledgers, factors, account, reference, partial(_costs, session, known=ledgers))


def _costs(session: "Session", plan: Plan = NOTHING, number: int = 0, known: Ledgers | None = None) -> Ledgers:
    """Under a plan, in a round of the search by its number. known: those without a plan."""
    long = session.long.fit if session.long else ()
    return collect(
        session.probe,
        session.units,
        some(session.samples.fit, SAMPLES // 2 if plan else SAMPLES, number),
        plan,
        session.treatments,
        measure=session.measure,
        seed=session.seed + number,
        description="costs under the plan so far" if plan else "costs",
        known=known,
        long=_fewer(long) if plan else long,
        screened=SCREENED,
    )


def _fewer(samples: Sequence[Sample]) -> list[Sample]:
    """Half of the texts, which then count twice, and all of what is said again: that is where a plan costs other than
    its parts do. Under a plan every sequence is passed twice."""
    found: list[Sample] = []
    for kind in dict.fromkeys(sample.kind for sample in samples):
        among = [sample for sample in samples if sample.kind == kind]
        kept = among if among[0].repetition else among[: (len(among) + 1) // 2]
        found += [replace(sample, weight=sample.weight * len(among) / len(kept)) for sample in kept]
    return found


def _factors(ledgers: Ledgers, account: WholeCache, reference: Reference) -> dict[str, float]:
    """For each kind of treatment, what a plan of it alone costs, to what was estimated. None is needed if there is only
    one kind."""
    found: dict[str, float] = {}
    kinds = [(name, kind) for name, ledger in ledgers.items() for kind in ledger.kinds]
    for name, kind in kinds if len(kinds) > 1 else ():
        state = State({name: ledgers[name].of_kind(kind)}, account=account)
        state.extend(TRIED)
        if state.chosen and state.estimate > 0:
            cost = cost_of(reference.measure(state.plan, f"what {kind} costs"))
            found[kind] = min(max(cost / state.estimate, FACTORS[0]), FACTORS[1])
    if found:
        announce(
            "cost as measured to estimated: " + ", ".join(f"{name} {factor:.2g}" for name, factor in found.items())
        )
    return found


def cost_of(distance: Distance) -> float:
    """What costs estimate: the divergence on text, and on repetition by its weight."""
    repeated = REPETITION_WEIGHT * (distance.repetition_divergence or 0.0)
    return (distance.divergence + repeated) / (1 + REPETITION_WEIGHT)


def cache_path(priced: Priced, parts: Mapping[float, float | None]) -> Iterator[Step]:
    """Plans that save parts of the cache, ascending, each with the nats by which the loss of copying may rise (None:
    whatever the text costs). Ends early if no more can be saved."""
    taken = Step(NOTHING, 0.0, 0.0)
    for part, most_copying in parts.items():
        if taken.plan and taken.removed >= part - 1e-9:  # the plan before saves as much already
            yield taken
            continue
        allowed = inf if most_copying is None else SHARE * most_copying
        attempts = list(_attempts(priced, part, allowed))
        over, state, measured = min(attempts, key=lambda attempt: attempt[0])
        if over > 0:
            announce(
                f"at {state.removed:.1%} of the cache copying costs {over + allowed:.2f} nats, more than it should"
            )
        if state.removed <= taken.removed:
            return
        taken = Step(state.plan, state.removed, priced.state(state.plan).estimate, measured)
        yield taken
        if state.removed < part - 1e-9:
            return


def _attempts(priced: Priced, part: float, allowed: float) -> Iterator[tuple[float, State, Distance]]:
    """States that save `part` of the cache, until one copies well enough: by how much it does not, and what was
    measured of it.

    First repetition counts in costs as usual, then for more. Then costs are measured again under a plan that saves
    less. If copying is lost still, the units that are to blame get back what they had, and others go on.
    """
    numbers = count(1)

    def tried(state: State) -> tuple[float, State, Distance]:
        over, measured = _over(priced, state, allowed, f"plan for {part:.0%}, attempt {next(numbers)}")
        return over, state, measured

    start = found = priced.state()
    for emphasis in EMPHASES:
        start = priced.state(emphasis=emphasis)
        found = start.copy()
        reached = found.extend(part)
        yield (attempt := tried(found))
        if attempt[0] <= 0 or not reached:
            return
    less = start.copy()
    if priced.again is not None and part > AGAIN and less.extend(part - AGAIN):
        start = priced.state(less.plan, priced.again(less.plan, 1), EMPHASES[-1])
        found = start.copy()
        if not found.extend(part):
            return
        yield (attempt := tried(found))
        if attempt[0] <= 0:
            return
    for _ in range(BACK_OFFS):
        back = found.copy()
        if not give_back(back, start.chosen):
            return
        start.bar_as(back)
        found = start.copy()
        if not found.extend(part):
            return
        yield (attempt := tried(found))
        if attempt[0] <= 0:
            return


def _over(priced: Priced, state: State, allowed: float, description: str) -> tuple[float, Distance]:
    """By how much a state's plan raises the loss of copying beyond what is allowed, and what was measured of it."""
    measured = priced.reference.measure(state.plan, description)
    return max(0.0, copying_rise(measured, priced.reference.base) - allowed), measured


def give_back(state: State, accepted: Mapping[Unit, Offer], most: int = GIVEN_BACK) -> bool:
    """Take from the units that cost most on repetition what they have been given since a plan that was accepted, for
    good. False: there are none."""
    windows = state.ledgers.get("window")

    def blame(unit: Unit) -> float:
        offer = state.chosen[unit]
        if isinstance(windows, WindowCosts) and offer.treatment == windows.treatment:
            return windows.cost(unit, windows.window_of(offer), repetition=True) * state.factors.get(
                offer.treatment, 1.0
            )
        return state.cost(offer)

    moved = [unit for unit, offer in state.chosen.items() if accepted.get(unit) != offer]
    worst = sorted(moved, key=lambda unit: (-blame(unit), unit))[:most]
    for unit in worst:
        if unit in state.chosen and state.chosen[unit] != accepted.get(unit):  # with another one of its layer, maybe
            state.undo(unit, accepted)
    return bool(worst)


def copying_rise(measured: Distance, base: Distance) -> float:
    """The most by which the loss rises on any held-out sequence of repetition, 0 if there is none."""
    return max((after - before for after, before in zip(measured.copying, base.copying, strict=True)), default=0.0)


def search_cache(session: "Session", recipe: "Recipe") -> Step:
    """The plan for a recipe's search. Raises RecipeError if it cannot reach its aim."""
    search = recipe.search
    assert search is not None
    found, copying = priced(session, search.at), most_copying(recipe)
    if search.cache is not None:
        last = None
        for step in cache_path(_best_alternative(found, search.cache), {search.cache: copying}):
            last = step
        if last is None or last.removed < search.cache - 1e-9:
            raise more_than_the_cache(search.cache, last.removed if last else 0.0, recipe.origin)
        return last
    assert search.max_perplexity_increase is not None
    limit, steps, refusals = search.max_perplexity_increase, list[Step](), list[RecipeError]()
    for choice in found.alternatives():
        try:
            steps.append(cache_within(choice, limit, copying, recipe.origin))
        except RecipeError as error:
            refusals.append(error)
    if not steps and refusals:
        raise refusals[0]
    return max(steps, key=lambda step: step.removed)


def _best_alternative(priced: Priced, part: float) -> Priced:
    """The one whose first plan for `part` of the cache costs least, as measured; those that reach it go before those
    that do not."""
    choices = priced.alternatives()
    if len(choices) < 2:
        return choices[0] if choices else priced
    rated = []
    for number, choice in enumerate(choices, start=1):
        state = choice.state()
        if state.extend(part):
            measured = priced.reference.measure(state.plan, f"choice {number} of {len(choices)}")
            rated.append((cost_of(measured), number, choice))
    return min(rated)[2] if rated else choices[0]


def most_copying(recipe: "Recipe") -> float | None:
    """Nats by which the loss of copying may rise at any distance; None: there is no limit."""
    return recipe.gate.max_copying_increase


def cache_within(priced: Priced, limit: float, most_copying: float | None, origin: "Origin") -> Step:
    """The plan that saves the most of those whose perplexity rises by no more than `limit` on held-out long text, with
    a standard error to spare, and that copy well enough. Raises RecipeError if there is none."""
    state = priced.state()
    steps: list[Step] = []
    while state.advance():
        if not steps or state.removed >= steps[-1].removed + FINEST:
            steps.append(Step(state.plan, state.removed, state.estimate))

    def copies(measured: Distance) -> bool:
        allowed = None if most_copying is None else SHARE * most_copying
        return allowed is None or copying_rise(measured, priced.reference.base) <= allowed

    found = longest(steps, limit, priced.reference, copies)
    if found is None:
        raise RecipeError(
            f"{origin.at('search', 'max_perplexity_increase')}: nothing can be saved of the cache within "
            f"{limit * 100:.4g}% of perplexity, with a standard error to spare: write a higher limit."
        )
    return found
