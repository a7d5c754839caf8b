"""Calibration as a whole: what a recipe leaves to be found on text, its plan and its refitted matrices."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sa_convert.console.progress import announce
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.plan import Plan
from sa_convert.heal.refit import Refit, refit
from sa_convert.observe.session import Session, open_session
from sa_convert.observe.tried import Reference
from sa_convert.plan.engines import searched_model
from sa_convert.search.budget import check_search, too_much, treatments_of
from sa_convert.search.choose import Step, path, rounds
from sa_convert.search.fitting import fit, learn
from sa_convert.search.whole_cache import search_cache
from sa_convert.search.within import within_limit
from sa_convert.treatments.registry import refittable

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Origin, Recipe, Search


@dataclass(frozen=True)
class Calibrated:
    """plan: the recipe's, or the one that was found. step, refit: None if the recipe asks for none. fitted: tensors of
    treatments."""

    plan: Plan
    step: Step | None
    refit: Refit | None
    fitted: Fitted = field(default_factory=Fitted)


def calibrate(model: Model, recipe: "Recipe", plan: Plan | None, run: RunOptions, *, refits: bool = True) -> Calibrated:
    """Search and refit as the recipe says.

    model: with its weights in the checkpoint's folder. plan: the recipe's; None: to be searched. refits: False
    leaves the refit out. Raises RecipeError (a budget that cannot be met), DataError (text, tokenizer) and
    CheckpointError (a model that cannot be loaded, or overflows).
    """
    refits = refits and recipe.refit == "ridge"
    check_search(model, recipe)
    model = searched_model(model, recipe)
    treatments, at = treatments_of(recipe, model), recipe.search.at if recipe.search and plan is None else None
    with open_session(model, recipe.calibration, run, treatments=treatments, at=at) as session:
        announce(f"calibrating on {_told(session)}; costs by {session.measure}")
        learn(session, plan)
        step = None
        if plan is None and recipe.search is not None:
            step = search_cache(session, recipe)
            plan = step.plan
        short = plan is None or (refits and refittable(plan))
        reference = Reference(session.probe, session.samples.held_out) if short else None
        if plan is None:
            assert reference is not None
            assert recipe.sharing is not None
            assert recipe.sharing.search is not None
            step = _search(session, recipe.sharing.search, reference, recipe.origin, recipe.refit == "ridge")
            plan = step.plan
        found = refit(session, plan, reference) if reference is not None and refits else None
        fitted = fit(session, plan)
    return Calibrated(plan, step, found, fitted)


def _told(session: Session) -> str:
    told = f"{len(session.samples.fit)} sequences of {session.samples.text}"
    if session.long is not None:
        told += f" and {len(session.long.fit)} of {session.long.length} tokens"
    return told


def _search(session: Session, search: "Search", reference: Reference, origin: "Origin", refits: bool) -> Step:
    """The plan for a recipe's search. refits: a refit follows, so a limit on perplexity holds for the model after it.

    reference: of the held-out samples. Raises RecipeError if the search cannot reach its aim.
    """
    if search.key_cache is not None:
        return _for_key_cache(session, search.key_cache, reference, origin)
    assert search.max_perplexity_increase is not None
    return within_limit(session, search.max_perplexity_increase, reference, origin, refits)


def _for_key_cache(session: Session, part: float, reference: Reference, origin: "Origin") -> Step:
    last = None
    for step in path(session, rounds(part), reference):
        last = step
    if last is None or last.removed < part - 1e-9:
        raise too_much(part, last.removed if last else 0.0, origin)
    return last
