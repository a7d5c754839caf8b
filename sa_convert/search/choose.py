"""The search: a plan for a budget, from costs that are measured again as units go."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa_convert.domain.calibrated import Distance
from sa_convert.domain.plan import Plan
from sa_convert.observe.sequences import REPETITION_WEIGHT, Sample
from sa_convert.observe.tried import Reference
from sa_convert.search.rounds import State
from sa_convert.search.scoring import Ledgers, collect

if TYPE_CHECKING:
    from sa_convert.observe.session import Session

ROUND = 0.125
"""Part of the key cache, about, after which costs are measured again."""

SWAPS = 3
"""Swaps that are tried in a round at the most."""

FIRST_SAMPLES, LATER_SAMPLES = 16, 10
"""Samples whose costs are measured in the first round and in each later one."""

NOTHING = Plan()


@dataclass(frozen=True)
class Step:
    """A plan on the way to the budget. removed: the part of the key cache that it saves. estimate: expected rise of the
    loss by the costs; measured: on held-out samples, or None if it was not measured."""

    plan: Plan
    removed: float
    estimate: float
    measured: Distance | None = None


def path(session: "Session", parts: list[float], reference: Reference, first: Ledgers | None = None) -> Iterator[Step]:
    """Plans that save `parts` of the key cache, ascending; each starts from the one before. Ends early if no more can
    be saved.

    In every round some plans are made: by the costs of the first round; by costs that are measured again under the
    plan so far; by these with other choices for units that are treated already, and with swaps. All are measured on
    held-out samples, and the one that diverges least from the base is taken. first: costs without a plan, if they are
    known.
    """
    first = first or costs_under(session)
    plan = NOTHING
    for number, part in enumerate(parts):
        states = [State(first, plan)]
        if number:
            again = costs_under(session, plan, number, first)
            states += [State(again, plan), State(again, plan)]
            states[-1].rematch()
        reached = [state.extend(part) for state in states]
        if number:
            _swaps(states[-1])
        options: list[tuple[Distance, State]] = []
        for at, state in enumerate(states, start=1):
            if not any(state.plan == other.plan for _, other in options):
                measured = reference.measure(state.plan, f"round {number + 1}: plan {at} of {len(states)}")
                options.append((measured, state))
        measured, best = min(options, key=lambda option: _badness(option[0]))
        if best.plan == plan:
            return
        plan = best.plan
        yield Step(plan, best.removed, State(first, plan).estimate, measured)
        if not all(reached):
            return


def costs_under(session: "Session", plan: Plan = NOTHING, number: int = 0, known: Ledgers | None = None) -> Ledgers:
    """Costs under a plan, in a round of the search by its number. known: those of the base as it is."""
    return collect(
        session.probe,
        session.units,
        some(session.samples.fit, LATER_SAMPLES if number else FIRST_SAMPLES, number),
        plan,
        session.treatments,
        measure=session.measure,
        seed=session.seed + number,
        description=f"costs, round {number + 1}",
        known=known,
    )


def some(samples: tuple[Sample, ...], count: int, turn: int = 0) -> list[Sample]:
    """About `count` of the samples, of text and of repetition in proportion; others in every turn."""
    found = []
    for kind in (False, True):
        of_kind = [sample for sample in samples if sample.repetition == kind]
        wanted = min(len(of_kind), max(1, round(count * len(of_kind) / len(samples))))
        found += [of_kind[(turn * wanted + at * len(of_kind) // wanted) % len(of_kind)] for at in range(wanted)]
    return found


def _swaps(state: State) -> None:
    for _ in range(SWAPS):
        if not state.swap():
            return


def _badness(distance: Distance) -> float:
    return distance.divergence + REPETITION_WEIGHT * (distance.repetition_divergence or 0.0)


def rounds(part: float) -> list[float]:
    """Equal steps of about ROUND up to `part`."""
    count = max(1, math.floor(part / ROUND + 0.5))
    return [part * (number + 1) / count for number in range(count)]
