"""What `analyze` measures: costs of every unit, and the loss along a search that goes beyond what is asked for."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sa_convert.console.progress import peak_memory
from sa_convert.domain.analysis import Analysis, CalibrationText, CurvePoint, UnitCost
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.report import BaseModel
from sa_convert.domain.units import Unit
from sa_convert.observe.session import Session, open_session
from sa_convert.observe.similarity import attention_statistics
from sa_convert.observe.tried import Reference
from sa_convert.plan.conversion import layers_in_recipe
from sa_convert.present.files.report_file import installed_versions
from sa_convert.search.budget import more_than_sharing, most_removable
from sa_convert.search.choose import ROUND, Step, costs_under, path, rounds
from sa_convert.search.rounds import State
from sa_convert.search.scoring import Ledgers
from sa_convert.treatments.plan_answers import groups_without_keys
from sa_convert.treatments.registry import lenders

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Calibration

CURVE_END = 0.5
"""Part of the key cache up to which the loss is followed, unless the recipe takes more."""


def analysis_of(model: Model, calibration: "Calibration", run: RunOptions, *, key_cache: float, seed: int) -> Analysis:
    """What treatments would cost the model, and a plan that removes `key_cache` (0 to 1). Raises RecipeError."""
    with open_session(model, calibration, run, seed) as session:
        units, samples = session.units, (*session.samples.fit, *session.samples.held_out)
        attention = attention_statistics(session.probe, units, samples)
        costs = costs_under(session)
        reference = Reference(session.probe, session.samples.held_out)
        steps, chosen = _steps(session, key_cache, reference, costs)
        return Analysis(
            base_model=BaseModel.of(model.checkpoint.identity, model.checkpoint.revision),
            family=model.family.model_type,
            calibration=CalibrationText(session.samples.text, len(samples), len(samples[0].tokens), seed),
            dtype=session.placement.dtype_name,
            measure=session.measure,
            heads=tuple(layer.heads for layer in model.geometry.layers),
            attention=attention,
            costs=tuple(_unit_cost(unit, costs) for unit in units.all),
            curve=tuple(_curve(steps, costs, reference)),
            plan=chosen.plan,
            layers=layers_in_recipe(chosen.plan, model.geometry),
            used_sources=Counter((layer, source) for layer, (source, _) in lenders(chosen.plan, model.geometry)),
            key_cache_removed=chosen.removed,
            peak_memory=peak_memory(),
            versions=installed_versions(),
            caches=any(layer.cached and layer.heads for layer in model.geometry.layers),
        )


def _unit_cost(unit: Unit, costs: Ledgers) -> UnitCost:
    """By the cheapest treatment, while all other units are as in the base."""
    offers = [offer for ledger in costs.values() if (offer := ledger.best(unit, frozenset({unit}))) is not None]
    offer = min(offers, key=lambda offer: offer.cost, default=None)
    return UnitCost(unit, offer.cost, offer.sources) if offer else UnitCost(unit, None, None)


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
