"""What `analyze --key-cache` measures: costs of sharing, and the loss along a search that goes beyond what is asked."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sa_convert.domain.analysis import Analysis, CurvePoint
from sa_convert.domain.model import Model, RunOptions
from sa_convert.observe.session import Session, open_session
from sa_convert.observe.similarity import attention_statistics
from sa_convert.observe.tried import Reference
from sa_convert.search.analyzed import analysis_from
from sa_convert.search.budget import more_than_sharing, most_removable
from sa_convert.search.choose import ROUND, Step, costs_under, path, rounds
from sa_convert.search.rounds import State
from sa_convert.search.scoring import Ledgers
from sa_convert.treatments.plan_answers import groups_without_keys

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Calibration

CURVE_END = 0.5
"""Part of the key cache up to which the loss is followed, unless the recipe takes more."""


def analysis_of(model: Model, calibration: "Calibration", run: RunOptions, *, key_cache: float, seed: int) -> Analysis:
    """What sharing would cost the model, and a plan that removes `key_cache` (0 to 1). Raises RecipeError."""
    with open_session(model, calibration, run, seed) as session:
        samples = (*session.samples.fit, *session.samples.held_out)
        attention = attention_statistics(session.probe, session.units, samples)
        costs = costs_under(session)
        reference = Reference(session.probe, session.samples.held_out)
        steps, chosen = _steps(session, key_cache, reference, costs)
        return analysis_from(session, attention, costs, chosen.plan, curve=tuple(_curve(steps, costs, reference)))


def _steps(session: Session, key_cache: float, reference: Reference, costs: Ledgers) -> tuple[list[Step], Step]:
    """The steps of a search for this part of the key cache and beyond, and the one that reaches it.

    The first of them are those of `convert` with `key_cache`, so the plan is the same. Raises RecipeError.
    """
    parts = rounds(key_cache)
    reached, last = len(parts), min(CURVE_END, most_removable(session.units, session.treatments))
    while parts[-1] + ROUND <= last + 1e-9:
        parts.append(parts[-1] + ROUND)
    steps = list(path(session, parts, reference, costs))
    chosen = steps[min(reached, len(steps)) - 1] if steps else None
    if chosen is None or chosen.removed < key_cache - 1e-9:
        raise more_than_sharing(key_cache, chosen.removed if chosen else 0.0)
    return steps, chosen


def _curve(steps: list[Step], costs: Ledgers, reference: Reference) -> Iterator[CurvePoint]:
    """What was measured at each step, and what the costs alone say of as much key cache."""
    cheapest = State(costs)
    for step in steps:
        assert step.measured is not None
        cheapest.extend(step.removed)
        yield CurvePoint(
            key_cache_removed=step.removed,
            groups=groups_without_keys(step.plan, cheapest.units.geometry),
            estimated_loss=cheapest.estimate,
            measured_loss=step.measured.loss - reference.base.loss,
            measured_divergence=step.measured.divergence,
            repetition_divergence=step.measured.repetition_divergence,
        )
