"""What `sa-convert analyze` does: what treatments would cost a model, and a recipe that follows from it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.console.amounts import format_percent
from sa_convert.console.progress import announce, peak_memory
from sa_convert.domain.analysis import Analysis, CalibrationText, CurvePoint, UnitCost
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.report import BaseModel
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import RecipeError
from sa_convert.models.trust import trusting
from sa_convert.output.staging import staging
from sa_convert.plan.conversion import layers_in_recipe, resolved_recipe
from sa_convert.present.files.analysis_folder import write_analysis
from sa_convert.present.files.report_file import installed_versions
from sa_convert.read.work_on import bytes_to_read, describe, source_of, with_weights
from sa_convert.treatments.plan_answers import groups_without_keys
from sa_convert.treatments.registry import lenders, searched

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Calibration, Recipe
    from sa_convert.observe.session import Session
    from sa_convert.observe.tried import Reference
    from sa_convert.search.choose import Step
    from sa_convert.search.scoring import Ledgers

CURVE_END = 0.5
"""Part of the key cache up to which the loss is followed, unless the recipe takes more."""

_HEADROOM = 16_000_000
"""Bytes of disk for figures and tables."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(RunOptions):
    """How to analyze."""

    key_cache: float = 0.25
    """The part that the recipe is to remove, 0 to 1."""

    text: str = "builtin"
    """Its calibration part is used; see `sa_convert.texts.text.load_text`."""

    sequences: int = 32
    """Of the text."""

    length: int = 512
    """Tokens of a sequence."""

    seed: int = 0
    """Of everything that is random."""

    overwrite: bool = False
    """An earlier result may be replaced."""


def analyze(reference: str, output: Path, options: AnalyzeOptions) -> Analysis:
    """Analyze the model that the user calls `reference` into the folder `output`, which appears complete or not at all.

    Raises a SaConvertError if the model, the text, the budget or the output does not allow it; what headers and options
    tell is refused before any weight is read.
    """
    # 1. What the model is, and what of the budget cannot be.
    model = describe(reference, options)
    described = model.checkpoint
    _check_budget(Units(model.geometry), options.key_cache)

    # 2. A folder beside the output, which becomes it at the end.
    space = _HEADROOM + bytes_to_read(described)
    with staging(output, options.overwrite, space, source_of(described, reference)) as stage:
        # 3. All weights, as safetensors.
        model = with_weights(model, reference, stage.root / "workspace", options)

        # 4. The pass: attention, costs, and a search that measures each of its steps.
        with trusting(model.checkpoint.folder, model.checkpoint.trusted):
            analysis = _analysis(model, options)

        # 5. Tables, figures, and a recipe.
        announce("drawing figures")
        recipe = resolved_recipe(_recipe(analysis, options), analysis.plan, model.geometry)
        write_analysis(analysis, recipe, stage.folder)
        stage.publish()
    return analysis


def _check_budget(units: Units, key_cache: float) -> None:
    from sa_convert.search.budget import most_removable

    most = most_removable(units, searched())
    if most == 0:
        raise RecipeError(" ".join(treatment.impossible for treatment in searched()))
    if key_cache > most + 1e-9:
        raise _too_much(key_cache, most)


def _too_much(asked: float, most: float) -> RecipeError:
    return RecipeError(
        f"--key-cache {format_percent(asked)}: sharing can remove {most:.2%} of this model's key cache at the most; "
        f"ask for {int(most * 100)}% or less."
    )


def _analysis(model: Model, options: AnalyzeOptions) -> Analysis:
    from sa_convert.observe.session import open_session
    from sa_convert.observe.similarity import attention_statistics
    from sa_convert.observe.tried import Reference
    from sa_convert.search.choose import costs_under

    announce("calibrating")
    with open_session(model, _calibration(options), options, options.seed) as session:
        units, samples = session.units, (*session.samples.fit, *session.samples.held_out)
        attention = attention_statistics(session.probe, units, samples)
        costs = costs_under(session)
        reference = Reference(session.probe, session.samples.held_out)
        steps, chosen = _steps(session, options.key_cache, reference, costs)
        return Analysis(
            base_model=BaseModel.of(model.checkpoint.identity, model.checkpoint.revision),
            family=model.family.model_type,
            calibration=CalibrationText(session.samples.text, len(samples), len(samples[0].tokens), options.seed),
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


def _calibration(options: AnalyzeOptions) -> "Calibration":
    from sa_convert.domain.recipe import Calibration

    # Not validated: `load_text` explains better what is wrong with a text.
    return Calibration.model_construct(text=options.text, sequences=options.sequences, length=options.length)


def _unit_cost(unit: Unit, costs: "Ledgers") -> UnitCost:
    """By the cheapest treatment, while all other units are as in the base."""
    offers = [offer for ledger in costs.values() if (offer := ledger.best(unit, frozenset({unit}))) is not None]
    offer = min(offers, key=lambda offer: offer.cost, default=None)
    return UnitCost(unit, offer.cost, offer.sources) if offer else UnitCost(unit, None, None)


def _steps(
    session: "Session", key_cache: float, reference: "Reference", costs: "Ledgers"
) -> tuple[list["Step"], "Step"]:
    """The steps of a search for this part of the key cache and beyond, and the one that reaches it.

    The first of them are those of `convert` with `key_cache`, so the plan is the same. Raises RecipeError.
    """
    from sa_convert.search.budget import most_removable
    from sa_convert.search.choose import ROUND, path, rounds

    parts = rounds(key_cache)
    reached, last = len(parts), min(CURVE_END, most_removable(session.units, session.treatments))
    while parts[-1] + ROUND <= last + 1e-9:
        parts.append(parts[-1] + ROUND)
    steps = list(path(session, parts, reference, costs))
    chosen = steps[min(reached, len(steps)) - 1] if steps else None
    if chosen is None or chosen.removed < key_cache - 1e-9:
        raise _too_much(key_cache, chosen.removed if chosen else 0.0)
    return steps, chosen


def _curve(steps: list["Step"], costs: "Ledgers", reference: "Reference") -> Iterator[CurvePoint]:
    """What was measured at each step, and what the costs alone say of as much key cache."""
    from sa_convert.search.rounds import State

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


def _recipe(analysis: Analysis, options: AnalyzeOptions) -> "Recipe":
    """The search with the refit and the gate of the shipped recipe that removes as much or next more."""
    from sa_convert.domain.recipe import Recipe, Search, Sharing
    from sa_convert.plan.recipe_file import load_recipe

    shipped = [load_recipe(name) for name in ("light", "balanced", "aggressive")]
    model = next(
        (r for r in shipped if r.search and (r.search.key_cache or 0) >= options.key_cache - 1e-9),
        shipped[-1],
    )
    share = f"{analysis.key_cache_removed:.1%} of the {analysis.keys_name}"
    return Recipe.model_construct(
        description=f"{share} of {analysis.base_model.id}, wherever it costs least; found by sa-convert analyze.",
        sharing=Sharing(search=Search.model_construct(key_cache=options.key_cache)),
        refit=model.refit,
        calibration=_calibration(options),
        gate=model.gate,
    )
