"""What `sa-convert analyze` does: what treatments would cost a model, and a recipe that follows from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.console.progress import announce
from sa_convert.domain.analysis import Analysis
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.units import Units
from sa_convert.models.trust import trusting
from sa_convert.output.staging import staging
from sa_convert.plan.conversion import resolved_recipe
from sa_convert.present.files.analysis_folder import write_analysis
from sa_convert.read.work_on import bytes_to_read, describe, source_of, with_weights
from sa_convert.search.budget import check_removable, more_than_sharing
from sa_convert.treatments.registry import searched

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Calibration, Recipe

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
    check_removable(Units(model.geometry), searched(), options.key_cache, more_than_sharing)

    # 2. A folder beside the output, which becomes it at the end.
    space = _HEADROOM + bytes_to_read(described)
    with staging(output, options.overwrite, space, source_of(described, reference)) as stage:
        # 3. All weights, as safetensors.
        model = with_weights(model, reference, stage.root / "workspace", options)

        # 4. The pass: attention, costs, and a search that measures each of its steps.
        analysis = _analysis(model, options)

        # 5. Tables, figures, and a recipe.
        announce("drawing figures")
        recipe = resolved_recipe(_recipe(analysis, options), analysis.plan, model.geometry)
        write_analysis(analysis, recipe, stage.folder)
        stage.publish()
    return analysis


def _analysis(model: Model, options: AnalyzeOptions) -> Analysis:
    announce("calibrating")
    from sa_convert.search.curve import analysis_of

    with trusting(model.checkpoint.folder, model.checkpoint.trusted):
        key_cache, seed = options.key_cache, options.seed
        return analysis_of(model, _calibration(options), options, key_cache=key_cache, seed=seed)


def _calibration(options: AnalyzeOptions) -> "Calibration":
    from sa_convert.domain.recipe import Calibration

    # Not validated: `load_text` explains better what is wrong with a text.
    return Calibration.model_construct(text=options.text, sequences=options.sequences, length=options.length)


def _recipe(analysis: Analysis, options: AnalyzeOptions) -> "Recipe":
    """The search with the refit and the gate of the shipped recipe that removes as much or next more."""
    from sa_convert.domain.recipe import Recipe, Search, Sharing
    from sa_convert.plan.recipe_file import load_recipe

    shipped = [load_recipe(name) for name in ("shared-light", "shared-balanced", "shared-aggressive")]
    model = next(
        (r for r in shipped if (_key_cache(r) or 0) >= options.key_cache - 1e-9),
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


def _key_cache(recipe: "Recipe") -> float | None:
    search = recipe.sharing.search if recipe.sharing else None
    return search.key_cache if search else None
