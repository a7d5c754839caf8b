"""The search for the most saving within a limit on perplexity: every step is measured, none is taken on an estimate."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from sa_convert.domain.calibrated import Distance
from sa_convert.domain.plan import Plan
from sa_convert.errors import RecipeError
from sa_convert.heal.refit import refit
from sa_convert.observe.tried import Reference
from sa_convert.search.choose import ROUND, Step, costs_under
from sa_convert.search.rounds import State

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin
    from sa_convert.observe.session import Session

FURTHER = (1.5, 1.2)
"""Multiples of what is saved without a refit that are tried with one, the largest first."""


def within_limit(session: "Session", limit: float, reference: Reference, origin: "Origin", refits: bool) -> Step:
    """The plan that saves the most of those whose perplexity rises by no more than `limit` (0.02 is 2%) on held-out
    samples, with a standard error to spare.

    Units are taken in the order of their cost; how many of a round keep within the limit is found by bisection. If
    all do, costs are measured again and another round follows. refits: what a refit of the final plan allows is tried,
    too. Raises RecipeError if even the cheapest unit is beyond the limit.
    """
    taken = Step(Plan(), 0.0, 0.0, reference.base)
    cheapest, first = None, None
    for number in range(round(1 / ROUND)):
        costs = costs_under(session, taken.plan, number, first)
        first = first or costs
        state = State(costs, taken.plan)
        steps = list(_steps(state, taken))
        last = longest(steps, limit, reference)
        cheapest = cheapest or (steps[0] if steps else None)
        if last is None:
            break
        taken = last
        if taken.plan != steps[-1].plan:
            break
    if not taken.plan:
        raise _impossible(limit, cheapest, reference, origin)
    return _further(session, State(costs, taken.plan), taken, limit, reference) if refits else taken


def _steps(state: State, before: Step) -> Iterator[Step]:
    """Plans with one unit more each, until a round is full."""
    start = state.removed
    while state.removed < start + ROUND - 1e-9 and state.advance():
        yield Step(state.plan, state.removed, before.estimate + state.rise)


def longest(
    steps: list[Step], limit: float, reference: Reference, also: Callable[[Distance], bool] | None = None
) -> Step | None:
    """The last step within the limit, by bisection, as measured; None if the first is not. also: what must hold too."""
    low, high, found = 0, len(steps), None  # steps before `low` are within, those from `high` on are not
    while low < high:
        middle = (low + high) // 2
        step = replace(steps[middle], measured=reference.measure(steps[middle].plan, "within the limit?"))
        assert step.measured is not None
        if _within(step.measured, reference.base, limit) and (also is None or also(step.measured)):
            low, found = middle + 1, step
        else:
            high = middle
    return found


def _further(session: "Session", state: State, taken: Step, limit: float, reference: Reference) -> Step:
    """What saves more and is within the limit with a refit, or `taken`."""
    wider = []
    for factor in reversed(FURTHER):
        state.extend(min(taken.removed * factor, 1.0))
        wider.append(Step(state.plan, state.removed, taken.estimate + state.rise))
    for step in reversed(wider):
        found = refit(session, step.plan, reference).report.after
        if _within(found, reference.base, limit):
            return replace(step, measured=found)
    return taken


def _within(measured: Distance | None, base: Distance, limit: float) -> bool:
    return measured is not None and _increase(measured, base) <= limit


def _increase(measured: Distance, base: Distance) -> float:
    """The rise of the perplexity as a fraction, a standard error of the mean over samples added."""
    rises = [after - before for after, before in zip(measured.losses, base.losses, strict=True)]
    error = stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
    return math.expm1(fmean(rises) + error)


def _impossible(limit: float, cheapest: Step | None, reference: Reference, origin: "Origin") -> RecipeError:
    cost = ""
    if cheapest is not None:
        measured = reference.measure(cheapest.plan, "the cheapest group")
        cost = f"; the cheapest group alone raises it by {_increase(measured, reference.base):.2%}"
    return RecipeError(
        f"{origin.at('sharing', 'search', 'max_perplexity_increase')}: nothing can be shared within "
        f"{limit * 100:.4g}% of perplexity, with a standard error to spare{cost}: write a higher limit."
    )
