"""The search for a part of the whole cache: treatments of all kinds compete for what each KV group saves at a length.

Costs are estimated once for all offers, and measured where the estimate is known to fail: the units that retrieve most
are treated one by one, each kind of treatment as a whole. Then every round's plan is measured on held-out long text and
on held-out repetition. One that raises the loss of copying beyond the limit is refused: the units that are to blame
get back what they had, and others go on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sa_convert.console.progress import announce
from sa_convert.domain.calibrated import Distance
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Unit
from sa_convert.errors import RecipeError
from sa_convert.observe import long_sequences
from sa_convert.observe.sequences import REPETITION_WEIGHT
from sa_convert.observe.tried import Reference
from sa_convert.plan.savings import value_size
from sa_convert.search.accounting import WholeCache
from sa_convert.search.budget import more_than_the_cache
from sa_convert.search.choose import NOTHING, Step, some
from sa_convert.search.retrieving import measure_retrieval
from sa_convert.search.rounds import State
from sa_convert.search.scoring import Ledgers, collect
from sa_convert.search.within import longest
from sa_convert.treatments.ledger import Offer
from sa_convert.treatments.window.cost import WindowCosts

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Recipe
    from sa_convert.observe.session import Session

SAMPLES = 8
"""Short sequences whose costs are measured, for treatments that do not ask for long ones."""

ROUND = 0.25
"""Part of the cache, about, after which a plan is measured."""

TRIED = 0.08
"""Part of the cache that a kind of treatment saves when its factor is measured, at the most."""

FACTORS = (0.5, 8.0)
"""What a kind's measured and estimated cost may be to each other."""

SHARE = 0.7
"""Part of the limit on copying that a plan of the search may take, since validation copies at other distances."""

ATTEMPTS = 4
"""Plans that are measured in a round at the most."""

FINEST = 0.01
"""Part of the cache by which plans differ that are measured for a limit on perplexity."""

GIVEN_BACK = 3
"""Units that get back what they had after a plan that was refused."""


@dataclass(frozen=True)
class Priced:
    """What a search goes by. ledgers: costs by treatment. factors: of each, as measured. account: of savings at a
    length. reference: of the held-out samples."""

    ledgers: Ledgers
    factors: Mapping[str, float]
    account: WholeCache
    reference: Reference

    def state(self, plan: Plan = NOTHING) -> State:
        return State(self.ledgers, plan, self.account, self.factors)


def priced(session: "Session", tokens: int) -> Priced:
    """Everything that is measured before the first choice. tokens: the length at which the cache counts."""
    samples = session.samples
    long = session.long.fit if session.long else ()
    ledgers = collect(
        session.probe,
        session.units,
        some(samples.fit, SAMPLES),
        NOTHING,
        session.treatments,
        measure=session.measure,
        seed=session.seed,
        long=long,
    )
    account = WholeCache(session.units, tokens, lambda layer: value_size(session.model, layer))
    windows = ledgers.get("window")
    if isinstance(windows, WindowCosts):
        measure_retrieval(session, windows)
    reference = Reference(session.probe, session.long.held_out if session.long else samples.held_out)
    return replace(Priced(ledgers, {}, account, reference), factors=_factors(ledgers, account, reference))


def _factors(ledgers: Ledgers, account: WholeCache, reference: Reference) -> dict[str, float]:
    """For each kind of treatment, what a plan of it alone costs, to what was estimated. None is needed if there is only
    one kind."""
    found: dict[str, float] = {}
    for name, ledger in ledgers.items() if len(ledgers) > 1 else ():
        state = State({name: ledger}, account=account)
        state.extend(TRIED)
        if state.chosen and state.estimate > 0:
            cost = cost_of(reference.measure(state.plan, f"what {name} costs"))
            found[name] = min(max(cost / state.estimate, FACTORS[0]), FACTORS[1])
    if found:
        announce(
            "cost as measured to estimated: " + ", ".join(f"{name} {factor:.2g}" for name, factor in found.items())
        )
    return found


def cost_of(distance: Distance) -> float:
    """What costs estimate: the divergence on text, and on repetition by its weight in long sequences."""
    repeated = long_sequences.REPETITION_WEIGHT * (distance.repetition_divergence or 0.0)
    return (distance.divergence + repeated) / (1 + REPETITION_WEIGHT)


def steps_to(part: float) -> list[float]:
    """Equal steps of about ROUND up to `part`."""
    count = max(1, round(part / ROUND))
    return [part * (number + 1) / count for number in range(count)]


def cache_path(priced: Priced, parts: list[float], most_copying: float | None) -> Iterator[Step]:
    """Plans that save `parts` of the cache, ascending; each starts from the one before. Ends early if no more can be
    saved. most_copying: nats by which the loss of copying may rise; None: whatever the text costs."""
    state = priced.state()
    allowed = None if most_copying is None else SHARE * most_copying
    for part in parts:
        accepted = dict(state.chosen)
        attempts: list[tuple[float, dict[Unit, Offer], Distance]] = []
        for attempt in range(ATTEMPTS):
            if not state.extend(part) and attempts:
                break
            measured = priced.reference.measure(state.plan, f"plan for {part:.0%}, attempt {attempt + 1}")
            over = copying_rise(measured, priced.reference.base) - (allowed or 0.0)
            attempts.append((over, dict(state.chosen), measured))
            if allowed is None or over <= 0 or not give_back(state, accepted):
                break
        over, state.chosen, measured = min(attempts, key=lambda attempt: attempt[0]) if allowed else attempts[-1]
        if allowed and over > 0:
            announce(
                f"at {state.removed:.1%} of the cache copying costs {over + allowed:.2f} nats, more than it should"
            )
        if not state.chosen or state.chosen == accepted:
            return
        yield Step(state.plan, state.removed, state.estimate, measured)
        if state.removed < part - 1e-9:
            return


def give_back(state: State, accepted: Mapping[Unit, Offer], count: int = GIVEN_BACK) -> bool:
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
    worst = sorted(moved, key=lambda unit: (-blame(unit), unit))[:count]
    for unit in worst:
        if unit in accepted:
            state.chosen[unit] = accepted[unit]
        else:
            del state.chosen[unit]
        state.bar(unit)
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
        for step in cache_path(found, steps_to(search.cache), copying):
            last = step
        if last is None or last.removed < search.cache - 1e-9:
            raise more_than_the_cache(search.cache, last.removed if last else 0.0, recipe.origin)
        return last
    assert search.max_perplexity_increase is not None
    return cache_within(found, search.max_perplexity_increase, copying, recipe.origin)


def most_copying(recipe: "Recipe") -> float | None:
    """Nats by which the loss of copying may rise at any distance; None: there is no limit."""
    limit: float | None = getattr(recipe.gate, "max_copying_increase", None)
    return limit


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
