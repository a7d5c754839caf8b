"""The pass behind `sa-convert analyze`: what sharing would cost a model, and a recipe that follows from it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.console.amounts import format_percent
from sa_convert.console.progress import notes, peak_memory
from sa_convert.domain.analysis import Analysis, CalibrationText, CurvePoint, UnitCost
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.report import BaseModel
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import RecipeError
from sa_convert.models.trust import trusting
from sa_convert.output.staging import staging
from sa_convert.present.files.analysis_folder import write_analysis
from sa_convert.present.files.report_file import installed_versions
from sa_convert.read.family_of import family_of
from sa_convert.read.geometry_of import geometry_of
from sa_convert.read.open_model import complete, open_model
from sa_convert.read.remote_code import allow_code

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe
    from sa_convert.observe.session import Session
    from sa_convert.observe.tried import Reference
    from sa_convert.search.choose import Step
    from sa_convert.search.costs import Costs

CURVE_END = 0.5
"""Part of the key cache up to which the loss is followed, unless the recipe takes more."""

_HEADROOM = 16_000_000
"""Bytes of disk for figures and tables."""


@dataclass(frozen=True)
class AnalyzeOptions:
    """key_cache: the part that the recipe is to remove, 0 to 1. text, sequences, length, seed: of the calibration.

    dtype, device: where and in which precision the model is run ("auto": as stored, on the best device); dtype is also
    that of the weights that a .gguf file is dequantised to. trust_remote_code: code that the model brings may run; see
    `sa_convert.read.remote_code`.
    """

    key_cache: float = 0.25
    text: str = "builtin"
    sequences: int = 32
    length: int = 512
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    trust_remote_code: bool = False

    @property
    def stored_dtype(self) -> str:
        return "float32" if self.dtype == "auto" else self.dtype


def analyze(
    model: str, output: Path, options: AnalyzeOptions, announce: Callable[[str], None] = lambda step: None
) -> Analysis:
    """Analyze `model` into the folder `output`, which appears complete or not at all.

    announce: told each step in a few words. Raises a SaConvertError where the model, the text, the budget or the output
    does not allow it; what headers and options tell is refused before any weight is read.
    """
    described = open_model(model, None, options.stored_dtype)
    units = Units(geometry_of(described, family_of(described.config, described.tensors)))
    notes(described.identity, described.notes)
    described = allow_code(described, options.trust_remote_code, announce)
    _check_budget(units, options.key_cache)
    ready = described.is_safetensors
    space = _HEADROOM + (0 if ready else described.weight_bytes)
    path = Path(model).expanduser()
    with staging(output, options.overwrite, space, path if path.exists() else described.folder) as stage:
        if described.absent:
            announce(f"downloading what the cache lacks of {described.identity}")
        if not ready:
            announce("reading weights")
        checkpoint = complete(described, model, stage.root / "workspace", options.stored_dtype)
        with trusting(checkpoint.folder, checkpoint.trusted):
            analysis = _analysis(checkpoint, units, options, announce)
        announce("drawing figures")
        write_analysis(analysis, _recipe(analysis, options), stage.folder)
        stage.publish()
    return analysis


def _check_budget(units: Units, key_cache: float) -> None:
    from sa_convert.search.budget import most_removable

    most = most_removable(units)
    if most == 0:
        raise RecipeError("No layer of this model can reuse the attention of an earlier one, so nothing can be shared.")
    if key_cache > most + 1e-9:
        raise _too_much(key_cache, most)


def _too_much(asked: float, most: float) -> RecipeError:
    return RecipeError(
        f"--key-cache {format_percent(asked)}: sharing can remove {most:.2%} of this model's key cache at the most; "
        f"ask for {int(most * 100)}% or less."
    )


def _analysis(
    checkpoint: Checkpoint, units: Units, options: AnalyzeOptions, announce: Callable[[str], None]
) -> Analysis:
    from sa_convert.domain.recipe import Calibration
    from sa_convert.observe.session import open_session
    from sa_convert.observe.similarity import attention_statistics
    from sa_convert.observe.tried import Reference
    from sa_convert.search.choose import collect_first

    # Not validated: `load_text` explains better what is wrong with a text.
    calibration = Calibration.model_construct(text=options.text, sequences=options.sequences, length=options.length)
    family = family_of(checkpoint.config, checkpoint.tensors)
    announce("calibrating")
    with open_session(
        checkpoint, family, units.geometry, calibration, options.device, options.dtype, options.seed
    ) as session:
        samples = (*session.samples.fit, *session.samples.held_out)
        attention = attention_statistics(session.probe, units, samples)
        costs = collect_first(session)
        reference = Reference(session.probe, session.samples.held_out)
        steps, chosen = _steps(session, options.key_cache, reference, costs)
        return Analysis(
            base_model=BaseModel.of(checkpoint.identity, checkpoint.revision),
            family=family.model_type,
            calibration=CalibrationText(session.samples.text, len(samples), len(samples[0].tokens), options.seed),
            dtype=session.placement.dtype_name,
            measure=session.measure,
            heads=tuple(layer.heads for layer in units.geometry.layers),
            attention=attention,
            costs=tuple(_unit_cost(unit, costs) for unit in units.all),
            curve=tuple(_curve(steps, costs, reference)),
            sharing=chosen.sharing,
            key_cache_removed=chosen.removed,
            peak_memory=peak_memory(),
            versions=installed_versions(),
            caches=any(layer.cached and layer.heads for layer in units.geometry.layers),
        )


def _unit_cost(unit: Unit, costs: "Costs") -> UnitCost:
    """While all other units keep their attention."""
    offer = costs.best(unit, frozenset({unit})) if unit in costs.second else None
    return UnitCost(unit, offer.cost, offer.sources) if offer else UnitCost(unit, None, None)


def _steps(session: "Session", key_cache: float, reference: "Reference", costs: "Costs") -> tuple[list["Step"], "Step"]:
    """The steps of a search for this part of the key cache and beyond, and the one that reaches it.

    The first of them are those of `convert` with `key_cache`, so the map is the same. Raises RecipeError.
    """
    from sa_convert.search.budget import most_removable
    from sa_convert.search.choose import ROUND, path, rounds

    parts = rounds(key_cache)
    reached, last = len(parts), min(CURVE_END, most_removable(session.units))
    while parts[-1] + ROUND <= last + 1e-9:
        parts.append(parts[-1] + ROUND)
    steps = list(path(session, parts, reference, costs))
    chosen = steps[min(reached, len(steps)) - 1] if steps else None
    if chosen is None or chosen.removed < key_cache - 1e-9:
        raise _too_much(key_cache, chosen.removed if chosen else 0.0)
    return steps, chosen


def _curve(steps: list["Step"], costs: "Costs", reference: "Reference") -> Iterator[CurvePoint]:
    """What was measured at each step, and what the costs alone say of as much key cache."""
    from sa_convert.search.rounds import State

    cheapest = State(costs, SharingMap({}))
    for step in steps:
        assert step.measured is not None
        cheapest.extend(step.removed)
        yield CurvePoint(
            key_cache_removed=step.removed,
            groups=step.sharing.reused_groups(costs.units.geometry),
            estimated_loss=cheapest.estimate,
            measured_loss=step.measured.loss - reference.base.loss,
            measured_divergence=step.measured.divergence,
            repetition_divergence=step.measured.repetition_divergence,
        )


def _recipe(analysis: Analysis, options: AnalyzeOptions) -> "Recipe":
    """The map with the refit and the gate of the shipped recipe that removes as much or next more."""
    from sa_convert.domain.recipe import Calibration, Recipe, Search, Sharing
    from sa_convert.plan.recipe_file import load_recipe

    shipped = [load_recipe(name) for name in ("light", "balanced", "aggressive")]
    model = next(
        (r for r in shipped if r.sharing.search and (r.sharing.search.key_cache or 0) >= options.key_cache - 1e-9),
        shipped[-1],
    )
    share = f"{analysis.key_cache_removed:.1%} of the {analysis.keys_name}"
    return Recipe.model_construct(
        description=f"{share} of {analysis.base_model.id}, wherever it costs least; found by sa-convert analyze.",
        sharing=Sharing(search=Search.model_construct(key_cache=options.key_cache)),
        refit=model.refit,
        calibration=Calibration.model_construct(text=options.text, sequences=options.sequences, length=options.length),
        gate=model.gate,
    )
