"""What `sa-convert convert` does: plan, calibrate, rewrite, validate, publish."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sa_convert.console.amounts import human_bytes
from sa_convert.console.progress import announce, note, notes, peak_memory
from sa_convert.domain.change import Change
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.plan import Plan
from sa_convert.domain.report import BaseModel, Report, Validation
from sa_convert.domain.stock import without_code
from sa_convert.jobs.first_stage import first_stages, staged_weights
from sa_convert.models.auto_class import auto_class_name, prediction_task
from sa_convert.models.processes import from_first
from sa_convert.models.trust import trusting
from sa_convert.output.staging import Stage
from sa_convert.plan.cache_used import cache_used
from sa_convert.plan.conversion import ConversionPlan, plan_conversion, resolved_recipe
from sa_convert.plan.converted import converted_parts, stock_parts
from sa_convert.plan.engines import check_engine
from sa_convert.plan.savings import depends_on_length, longest_window
from sa_convert.present.files.report_file import installed_versions, write_report
from sa_convert.read.folder import open_folder
from sa_convert.read.remote_code import left_out
from sa_convert.read.work_on import bytes_to_read, describe, source_of, with_weights
from sa_convert.rewrite.fitted_edits import fitted_edits
from sa_convert.rewrite.overwrite import overwrite_tensors
from sa_convert.rewrite.refitted import check_refittable, refit_edits
from sa_convert.rewrite.rewrite import needed_bytes, rewrite_checkpoint
from sa_convert.rewrite.shards import Written
from sa_convert.treatments.registry import runtime_files, used_in

if TYPE_CHECKING:
    from sa_convert.domain.healed import HealReport
    from sa_convert.domain.recipe import Recipe
    from sa_convert.search.calibration import Calibrated

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(RunOptions):
    """How to convert."""

    calibration: str | None = None
    """Text (see `sa_convert.texts.text.load_text`), or None for the recipe's."""

    validate: bool = True
    """Run both models; the report claims no quality otherwise."""

    overwrite: bool = False
    """An earlier result may be replaced."""


def plan(reference: str, recipe: "Recipe", options: ConvertOptions) -> ConversionPlan:
    """What `convert` would do. From headers alone, unless the recipe asks for a search, which then runs."""
    # 1. What the model is, and what of the recipe cannot be.
    recipe = _with_text(recipe, options)
    model = describe(reference, options)
    notes(model.checkpoint.identity, left_out(model.checkpoint))
    check_engine(recipe, model)
    if recipe.searches is None:
        return plan_conversion(model, recipe)
    _check_calibration(model, recipe)
    # 2. The search, which several processes may share.
    with TemporaryDirectory(prefix="sa-convert-") as workspace:
        loaded = from_first(lambda: with_weights(model, reference, Path(workspace), options))
        calibrated = _calibrate(loaded, recipe, None, options, refits=False)
    # 3. The plan that it has found.
    return plan_conversion(model, recipe, calibrated.plan)


def convert(
    reference: str, recipe: "Recipe", output: Path, options: ConvertOptions, recipe_name: str | None = None
) -> Report | None:
    """Convert the model that the user calls `reference` by `recipe` into the folder `output`, which appears complete or
    not at all. recipe_name: as the report says it. Every process of a launch calls it; None is the result of all but
    the first.

    Raises a SaConvertError: GateRefused if the result is not good enough, the others if the model, the recipe or the
    output does not allow it.
    """
    # 1. What the model is, from headers alone. What these tell is refused before any weight is read.
    recipe = _with_text(recipe, options)
    model = describe(reference, options)
    notes(model.checkpoint.identity, left_out(model.checkpoint))
    described = model.checkpoint
    check_engine(recipe, model)
    if options.validate:
        prediction_task(described.config, reference)

    # 2. The plan, unless a search has to find it.
    conversion = None if recipe.searches else plan_conversion(model, recipe)
    _check_calibration(model, recipe)

    # 3. A folder beside the output, which becomes it at the end.
    space = needed_bytes(described, conversion.edits if conversion else {}) + bytes_to_read(described)
    with first_stages(output, options.overwrite, space, source_of(described, reference)) as stage:
        # 4. All weights, as safetensors.
        model = staged_weights(model, reference, stage, options)

        # 5. What the recipe leaves to be found on text: its plan, its refitted matrices.
        calibrated = None
        if recipe.needs or (conversion and any(treatment.fits for treatment in used_in(conversion.plan))):
            calibrated = _calibrate(model, recipe, conversion.plan if conversion else None, options)
        conversion = plan_conversion(model, recipe, calibrated.plan if calibrated else None)
        if stage is None:  # another process writes
            if recipe.heal is not None:
                _heal(conversion, recipe, options, None)
            return None
        if calibrated and calibrated.refit:
            file = stage.workspace / "refitted.safetensors"
            refitted = refit_edits(model, calibrated.refit.changes, file)
            conversion = replace(conversion, edits={**conversion.edits, **refitted})
        if calibrated:
            fitted = fitted_edits(calibrated.fitted, stage.workspace / "fitted.safetensors")
            conversion = replace(conversion, edits={**conversion.edits, **fitted})

        # 6. The weights, the configuration, and the code that travels.
        announce("rewriting weights")
        edits, runtimes = conversion.edits, runtime_files()
        written = rewrite_checkpoint(
            model.checkpoint,
            model.family,
            conversion.plan,
            edits,
            stage.folder,
            runtimes=runtimes,
            stock=conversion.stock,
        )

        # 7. A little training, if the recipe asks for it; then both models run, and the gate may refuse the result.
        healed = None
        if recipe.heal is not None:
            healed, recipe = _heal(conversion, recipe, options, stage)
        validation = validated(conversion, recipe, options, stage) if options.validate else None

        # 8. What people read of it. The folder appears.
        report = report_of(conversion, written, validation, recipe_name)
        refit = calibrated.refit.report if calibrated and calibrated.refit else None
        report = replace(report, refit=refit, heal=healed)
        publish(report, conversion, recipe, stage)
    return report


def _with_text(recipe: "Recipe", options: ConvertOptions) -> "Recipe":
    return recipe.with_text(options.calibration) if options.calibration else recipe


def _check_calibration(model: Model, recipe: "Recipe") -> None:
    """What can be refused before weights are read. Raises RecipeError, CheckpointError."""
    if recipe.searches is not None:
        from sa_convert.search.budget import check_search

        check_search(model, recipe)
    if recipe.refit == "ridge":
        check_refittable(model)


def _calibrate(
    model: Model, recipe: "Recipe", plan: Plan | None, options: ConvertOptions, *, refits: bool = True
) -> "Calibrated":
    from sa_convert.search.calibration import calibrate

    announce("loading the model to calibrate it")
    with trusting(model.checkpoint.folder, model.checkpoint.trusted):
        calibrated = calibrate(model, recipe, plan, options, refits=refits)
    announce(f"calibrated; peak memory {human_bytes(peak_memory())}")
    return calibrated


def _heal(
    conversion: ConversionPlan, recipe: "Recipe", options: ConvertOptions, stage: Stage | None
) -> tuple["HealReport", "Recipe"]:
    """Heal what was written, and say so in the recipe. If that does not help on held-out text and copying, the weights
    stay as they are. stage: None for all processes but the first."""
    from sa_convert.heal.distillation import HealingTask, heal
    from sa_convert.heal.resolved_settings import resolve

    assert recipe.heal is not None
    recipe = recipe.with_heal(resolve(recipe.heal, recipe, conversion))
    assert recipe.heal is not None
    base = conversion.model.checkpoint
    written, folder = from_first(partial(_healing_folders, stage))
    folder_now = open_folder(written)
    if without_code(conversion.stock) is None:
        converted, found = converted_parts(folder_now)
    else:
        converted, found = stock_parts(folder_now, conversion.plan), conversion.plan
    task = HealingTask(converted=converted, plan=found, base=base, settings=recipe.heal, run=options, state=folder)
    announce("loading both models to heal the converted one")
    with trusting(base.folder, base.trusted):
        healed = heal(task)
    if stage is None:
        return healed.report, recipe
    if healed.report.kept is None:
        note(f"healing was left out, since it made the model worse: {'; '.join(healed.report.refused)}")
    overwrite_tensors(converted.checkpoint, stage.folder, healed.tensors)
    return healed.report, recipe


def _healing_folders(stage: Stage | None) -> tuple[Path, Path]:
    """What is healed, and where that keeps its state."""
    assert stage is not None
    return stage.folder, stage.workspace / "healing"


def validated(conversion: ConversionPlan, recipe: "Recipe", options: RunOptions, stage: Stage) -> Validation:
    from sa_convert.measure.quality.gate import validate
    from sa_convert.measure.quality.questions import Use
    from sa_convert.measure.quality.verdict import refuse_if_failed
    from sa_convert.texts.text import load_text

    announce("validating")
    base, text, gate = conversion.model.checkpoint, load_text(recipe.calibration.text), recipe.gate
    use = None
    if recipe.at is not None or depends_on_length(conversion.model, conversion.plan):
        use = Use(at=conversion.used_at, window=longest_window(conversion.model, conversion.plan))
    with trusting(base.folder, base.trusted):
        validation = validate(
            base.folder,
            stage.folder,
            text,
            gate.max_perplexity_increase,
            options,
            max_copying_increase=gate.max_copying_increase,
            use=use,
        )
    refuse_if_failed(validation)
    return validation


def report_of(
    conversion: ConversionPlan, written: Written, validation: Validation | None, recipe_name: str | None
) -> Report:
    """Sizes are those of the files as written, and of a real cache if one was measured."""
    checkpoint = conversion.model.checkpoint
    code = checkpoint.code if checkpoint.trusted else ()
    savings = replace(conversion.savings, checkpoint_bytes=Change(checkpoint.weight_bytes, written.total_bytes))
    cache = cache_used(conversion.model, conversion.plan, conversion.used_at, validation)
    if validation is not None:
        savings = replace(savings, cache_bytes_per_token=validation.cache_bytes_per_token)
    if cache is not None and savings.cache_over is not None:
        savings = replace(savings, cache_bytes_per_token=Change(cache.before // cache.at, cache.after // cache.at))
    return Report(
        base_model=BaseModel.of(checkpoint.identity, checkpoint.revision).with_code(code),
        family=conversion.model.family.model_type,
        stacks=conversion.model.geometry.stacks,
        treated=conversion.treated,
        savings=savings,
        perplexity=validation.perplexity if validation else None,
        decode_check=validation.decode_check if validation else None,
        gate=validation.gate if validation else None,
        copying=validation.copying if validation else None,
        agreement=validation.agreement if validation else None,
        cache=cache,
        long=validation.long if validation else None,
        recipe=recipe_name,
        versions=installed_versions(),
        auto_class=auto_class_name(checkpoint.config),
        stock=conversion.stock,
    )


def publish(report: Report, conversion: ConversionPlan, recipe: "Recipe", stage: Stage) -> None:
    from sa_convert.plan.recipe_file import dump_recipe
    from sa_convert.present.charts import plan_figure as figure
    from sa_convert.present.files.card import write_card

    geometry = conversion.model.geometry
    resolved = dump_recipe(resolved_recipe(recipe, conversion.plan, geometry))
    (stage.folder / RECIPE_FILE).write_text(resolved, encoding="utf-8")
    write_report(report, stage.folder)
    if report.heal is not None:
        from sa_convert.present.charts.chart_heal import FILE, heal_chart
        from sa_convert.present.charts.chart_parts import save

        save(partial(heal_chart, report.heal), stage.folder / FILE)
    figure.plan_figure(conversion.plan, geometry, stage.folder / figure.file_for(conversion.plan.treatments))
    card = conversion.model.checkpoint.folder / "README.md"
    write_card(report, resolved, stage.folder, card if card.exists() else None)
    stage.publish()
