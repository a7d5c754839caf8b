"""What was found out about a model, put together for `analyze`."""

from collections import Counter
from typing import TYPE_CHECKING

from sa_convert.console.progress import peak_memory
from sa_convert.domain.analysis import Analysis, AttentionStatistics, CalibrationText, CurvePoint, UnitCost
from sa_convert.domain.frontier import Frontier
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.plan import Plan
from sa_convert.domain.report import BaseModel
from sa_convert.domain.units import Unit
from sa_convert.observe.sequences import Sample
from sa_convert.observe.session import Session, open_session
from sa_convert.observe.similarity import attention_statistics
from sa_convert.plan.conversion import layers_in_recipe
from sa_convert.plan.savings import key_cache_removed
from sa_convert.present.files.report_file import installed_versions
from sa_convert.search.budget import check_search, more_than_the_cache, treatments_of
from sa_convert.search.budgets import PARTS, frontier_of
from sa_convert.search.fitting import learn
from sa_convert.search.scoring import Ledgers
from sa_convert.search.whole_cache import priced
from sa_convert.treatments.registry import lenders

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe


def frontier_analysis(model: Model, recipe: "Recipe", run: RunOptions, *, seed: int) -> Analysis:
    """What treatments would cost the model, the frontier of a search, and the plan for the part of the cache that the
    recipe searches for. Raises RecipeError."""
    search, treatments = recipe.search, treatments_of(recipe, model)
    assert search is not None
    assert search.cache is not None
    check_search(model, recipe)
    with open_session(model, recipe.calibration, run, seed, treatments, search.at) as session:
        learn(session, None)
        attention = attention_statistics(session.probe, session.units, _samples(session))
        found = priced(session, search.at)
        frontier = frontier_of(session, found, sorted({*PARTS, search.cache}))
        together = frontier.lines().get(tuple(found.ledgers), [])
        chosen = next((point for point in together if point.cache.removed >= search.cache - 1e-9), None)
        if chosen is None:
            most = max((point.cache.removed for point in together), default=0.0)
            raise more_than_the_cache(search.cache, most, recipe.origin)
        return analysis_from(session, attention, found.ledgers, chosen.plan, frontier=frontier)


def analysis_from(
    session: Session,
    attention: AttentionStatistics,
    costs: Ledgers,
    plan: Plan,
    *,
    curve: tuple[CurvePoint, ...] = (),
    frontier: Frontier | None = None,
) -> Analysis:
    """plan: that of recipe.yaml. costs: of the base as it is."""
    model, samples = session.model, _samples(session)
    return Analysis(
        base_model=BaseModel.of(model.checkpoint.identity, model.checkpoint.revision),
        family=model.family.model_type,
        calibration=CalibrationText(session.samples.text, len(samples), len(samples[0].tokens), session.seed),
        dtype=session.placement.dtype_name,
        measure=session.measure,
        heads=tuple(layer.heads for layer in model.geometry.layers),
        attention=attention,
        costs=tuple(_unit_cost(unit, costs) for unit in session.units.all),
        curve=curve,
        plan=plan,
        layers=layers_in_recipe(plan, model.geometry),
        used_sources=Counter((layer, source) for layer, (source, _) in lenders(plan, model.geometry)),
        key_cache_removed=key_cache_removed(model, plan),
        peak_memory=peak_memory(),
        versions=installed_versions(),
        caches=any(layer.cached and layer.heads for layer in model.geometry.layers),
        frontier=frontier,
    )


def _samples(session: Session) -> tuple[Sample, ...]:
    return (*session.samples.fit, *session.samples.held_out)


def _unit_cost(unit: Unit, costs: Ledgers) -> UnitCost:
    """By the cheapest treatment, sharing first, while all other units are as in the base."""
    offers = [offer for ledger in costs.values() for offer in ledger.offers(unit, frozenset({unit}))]
    every = tuple(
        (offer.treatment, next(iter(offer.plan.values()))[offer.treatment], offer.cost)
        for offer in offers
        if offer.plan
    )
    offer = min(offers, key=lambda offer: (not offer.sources, offer.cost), default=None)
    return UnitCost(unit, offer.cost, offer.sources, every) if offer else UnitCost(unit, None, None)
