"""What `sa-convert analyze` does: what treatments would cost a model, and a recipe that follows from it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.console.progress import announce
from sa_convert.domain.analysis import Analysis
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Units
from sa_convert.jobs.first_stage import first_stages, staged_weights
from sa_convert.models.placement import positions
from sa_convert.models.trust import trusting
from sa_convert.plan.conversion import resolved_recipe
from sa_convert.present.files.analysis_folder import RECIPE_FILE, write_analysis
from sa_convert.read.work_on import bytes_to_read, describe, source_of
from sa_convert.search.budget import check_removable, check_search, more_than_sharing
from sa_convert.treatments.registry import searched

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Calibration, Recipe

AT = 4096
"""Tokens at which the cache counts unless the user says otherwise: as in the shipped recipes."""

SHARED = 0.25
"""Part of the keys of a model that caches nothing."""

_HEADROOM = 16_000_000
"""Bytes of disk for figures and tables."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(RunOptions):
    """How to analyze."""

    cache: float = 0.5
    """The part of the whole cache that recipe.yaml is to save, 0 to 1."""

    at: int | None = None
    """Tokens at which the cache counts; None: AT, or the model's positions if they are fewer."""

    treatments: tuple[str, ...] | None = None
    """What a search may use; None: those that it uses unless it is told otherwise."""

    key_cache: float | None = None
    """Part of the key cache that the recipe is to remove by sharing alone, 0 to 1; None: `cache` counts."""

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


def analyze(reference: str, output: Path, options: AnalyzeOptions) -> Analysis | None:
    """Analyze the model that the user calls `reference` into the folder `output`, which appears complete or not at all.
    Every process of a launch calls it; None is the result of all but the first.

    Raises a SaConvertError if the model, the text, the budget or the output does not allow it; what headers and options
    tell is refused before any weight is read.
    """
    # 1. What the model is, and what of the budget cannot be.
    model = describe(reference, options)
    described = model.checkpoint
    options = _meant(model, options)
    if options.key_cache is not None:
        check_removable(Units(model.geometry), searched(), options.key_cache, more_than_sharing)
    else:
        check_search(model, _cache_recipe(options))

    # 2. A folder beside the output, which becomes it at the end.
    space = _HEADROOM + bytes_to_read(described)
    with first_stages(output, options.overwrite, space, source_of(described, reference)) as stage:
        # 3. All weights, as safetensors.
        model = staged_weights(model, reference, stage, options)

        # 4. The pass: attention, costs, and a search that measures each of its steps.
        analysis = _analysis(model, options)
        if stage is None:  # another process writes
            return None

        # 5. Tables, figures, and recipes.
        announce("drawing figures")
        recipes = {name: resolved_recipe(*found, model.geometry) for name, found in _recipes(analysis, options).items()}
        write_analysis(analysis, recipes, stage.folder)
        stage.publish()
    return analysis


def _meant(model: Model, options: AnalyzeOptions) -> AnalyzeOptions:
    """With what the user left open. A model that caches nothing can save no part of a cache, but keys."""
    if options.key_cache is not None:
        return options
    if not any(layer.cached and layer.heads for layer in model.geometry.layers):
        return replace(options, key_cache=SHARED)
    return replace(options, at=options.at or min(AT, positions(model.checkpoint.config) or AT))


def _analysis(model: Model, options: AnalyzeOptions) -> Analysis:
    announce("calibrating")
    with trusting(model.checkpoint.folder, model.checkpoint.trusted):
        if options.key_cache is None:
            from sa_convert.search.analyzed import frontier_analysis

            return frontier_analysis(model, _cache_recipe(options), options, seed=options.seed)
        from sa_convert.search.curve import analysis_of

        key_cache, seed = options.key_cache, options.seed
        return analysis_of(model, _calibration(options), options, key_cache=key_cache, seed=seed)


def _calibration(options: AnalyzeOptions) -> "Calibration":
    from sa_convert.domain.recipe import Calibration

    # Not validated: `load_text` explains better what is wrong with a text.
    return Calibration.model_construct(text=options.text, sequences=options.sequences, length=options.length)


def _recipes(analysis: Analysis, options: AnalyzeOptions) -> "dict[str, tuple[Recipe, Plan]]":
    """By file, with their plans: recipe.yaml, and one for each point of the frontier."""
    if analysis.frontier is None:
        return {RECIPE_FILE: (_sharing_recipe(analysis, options), analysis.plan)}
    found = {RECIPE_FILE: (_frontier_recipe(analysis, options, options.cache), analysis.plan)}
    for point in analysis.frontier.points:
        found[point.recipe] = (_frontier_recipe(analysis, options, point.cache.removed, point.treatments), point.plan)
    return found


def _cache_recipe(options: AnalyzeOptions) -> "Recipe":
    from sa_convert.domain.recipe import CacheSearch, Recipe

    return Recipe.model_construct(
        search=CacheSearch.model_construct(cache=options.cache, at=options.at),
        treatments=options.treatments,
        calibration=_calibration(options),
    )


def _frontier_recipe(
    analysis: Analysis, options: AnalyzeOptions, saved: float, treatments: tuple[str, ...] | None = None
) -> "Recipe":
    """A plan with the refit and the gate of the shipped recipe that saves as much or next more."""
    from sa_convert.plan.recipe_file import load_recipe

    shipped = [load_recipe(name) for name in ("light", "balanced", "aggressive")]
    model = next((r for r in shipped if r.search and (r.search.cache or 0) >= saved - 0.01), shipped[-1])
    by = f" by {' and '.join(treatments)}" if treatments else ""
    where = f"{saved:.1%} of the cache of {analysis.base_model.id} at {options.at} tokens{by}"
    described = f"{where}, wherever it costs least; found by sa-convert analyze."
    calibration = _calibration(options)
    return model.model_copy(update={"description": described, "calibration": calibration, "treatments": None})


def _sharing_recipe(analysis: Analysis, options: AnalyzeOptions) -> "Recipe":
    """The search with the refit and the gate of the shipped recipe that removes as much or next more."""
    from sa_convert.domain.recipe import Recipe, Search, Sharing
    from sa_convert.plan.recipe_file import load_recipe

    assert options.key_cache is not None
    shipped = [load_recipe(name) for name in ("shared-light", "shared-balanced", "shared-aggressive")]
    least = options.key_cache - 1e-9
    model = next((recipe for recipe in shipped if (_key_cache(recipe) or 0) >= least), shipped[-1])
    share = f"{analysis.key_cache_removed:.1%} of the {analysis.keys_name}"
    return Recipe.model_construct(
        description=f"{share} of {analysis.base_model.id}, wherever it costs least; found by sa-convert analyze.",
        sharing=Sharing(search=Search.model_construct(key_cache=options.key_cache)),
        refit=model.refit,
        calibration=_calibration(options),
        gate=model.gate,
    )


def _key_cache(recipe: "Recipe") -> float | None:
    search = recipe.sharing.search if recipe.sharing else None
    return search.key_cache if search else None
