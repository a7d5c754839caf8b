"""The main job: plan, rewrite, validate, publish."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sa_convert.console.progress import notes, peak_memory
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.model import Model
from sa_convert.domain.report import BaseModel, Change, Report, Savings, Validation
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.domain.units import Units
from sa_convert.models.auto_class import auto_class_name, prediction_task
from sa_convert.models.trust import trusting
from sa_convert.output.staging import Stage, staging
from sa_convert.plan.plan import ConversionPlan, plan_conversion
from sa_convert.present.files.report_file import installed_versions, write_report
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import complete, open_model
from sa_convert.read.remote_code import allow_code, left_out
from sa_convert.rewrite.refitted import check_refittable, refit_edits
from sa_convert.rewrite.rewrite import needed_bytes, rewrite_checkpoint
from sa_convert.rewrite.shards import Written

if TYPE_CHECKING:
    from sa_convert.domain.recipe import Recipe
    from sa_convert.search.calibration import Calibrated

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert. calibration: text (see `sa_convert.texts.text.load_text`), or None for the recipe's.

    dtype, device: where and in which precision models are run ("auto": as stored, on the best device); dtype is also
    that of the weights that a .gguf file is dequantised to. layer_by_layer: keep one layer's weights in memory at a
    time wherever models are run, even if all of them would fit. trust_remote_code: code that the base model brings may
    run; see `sa_convert.read.remote_code`.
    """

    calibration: str | None = None
    validate: bool = True
    overwrite: bool = False
    dtype: str = "auto"
    device: str = "auto"
    layer_by_layer: bool = False
    trust_remote_code: bool = False

    @property
    def stored_dtype(self) -> str:
        return "float32" if self.dtype == "auto" else self.dtype


Announce = Callable[[str], None]
"""Told each step of a conversion in a few words."""


def plan(
    model: str, recipe: "Recipe", options: ConvertOptions, announce: Announce = lambda step: None
) -> ConversionPlan:
    """What `convert` would do. From headers alone, unless the recipe asks for a search, which then runs."""
    subject = _described(model, options, announce)
    recipe = _with_text(recipe, options)
    if recipe.sharing.search is None:
        return plan_conversion(subject, recipe)
    _check_calibration(subject, recipe)
    with TemporaryDirectory(prefix="sa-convert-") as workspace:
        loaded = _complete(subject, model, Path(workspace), options, announce)
        found = _calibrate(loaded, recipe, None, options, announce, refits=False)
    return plan_conversion(subject, recipe, found.sharing)


def convert(
    model: str,
    recipe: "Recipe",
    output: Path,
    options: ConvertOptions,
    recipe_name: str | None = None,
    announce: Announce = lambda step: None,
) -> Report:
    """Convert `model` by `recipe` into the folder `output`, which appears complete or not at all.

    Raises a SaConvertError: GateRefused where the result is not good enough, the others where the model, the recipe or
    the output does not allow it.
    """
    recipe = _with_text(recipe, options)
    subject = _described(model, options, announce)
    described = subject.checkpoint
    if options.validate:
        prediction_task(described.config, model)
    conversion = None if recipe.sharing.search else plan_conversion(subject, recipe)
    _check_calibration(subject, recipe)
    space = needed_bytes(described, conversion.edits if conversion else {})
    space += 0 if described.is_safetensors else described.weight_bytes
    with staging(output, options.overwrite, space, source_of(described, model)) as stage:
        subject = _complete(subject, model, stage.root / "workspace", options, announce)
        found = None
        if recipe.needs:
            sharing = conversion.sharing if conversion else None
            found = _calibrate(subject, recipe, sharing, options, announce)
        conversion = plan_conversion(subject, recipe, found.sharing if found else None)
        if found and found.refit:
            file = stage.workspace / "refitted.safetensors"
            refitted = refit_edits(
                subject.checkpoint, subject.family, subject.geometry.stacks, found.refit.changes, file
            )
            conversion = replace(conversion, edits={**conversion.edits, **refitted})
        announce("rewriting weights")
        written = rewrite_checkpoint(
            conversion.checkpoint, conversion.family, conversion.sharing, conversion.edits, stage.folder
        )
        validation = _validate(conversion, recipe, options, stage, announce) if options.validate else None
        report = _report(conversion, written, validation, recipe_name)
        report = replace(report, refit=found.refit.report if found and found.refit else None)
        _publish(report, conversion, recipe, stage)
    return report


def source_of(checkpoint: Checkpoint, model: str) -> Path:
    """The file or folder of a model, which must survive: of one on the Hub, that in the cache."""
    path = Path(model).expanduser()
    return path if path.exists() else checkpoint.folder


def _described(model: str, options: ConvertOptions, announce: Announce) -> Model:
    """From headers alone. Code of the model is not run, but refused here where it would have to."""
    subject = model_of(open_model(model, None, options.stored_dtype))
    notes(subject.checkpoint.identity, (*subject.checkpoint.notes, *left_out(subject.checkpoint)))
    return replace(subject, checkpoint=allow_code(subject.checkpoint, options.trust_remote_code, announce))


def _complete(subject: Model, model: str, workspace: Path, options: ConvertOptions, announce: Announce) -> Model:
    """With all weights at hand, as safetensors."""
    described = subject.checkpoint
    if described.absent:
        announce(f"downloading what the cache lacks of {described.identity}")
    if not described.is_safetensors:
        announce("reading weights")
    found = complete(described, model, workspace, options.stored_dtype)
    return subject if found is described else model_of(found)


def _with_text(recipe: "Recipe", options: ConvertOptions) -> "Recipe":
    return recipe.with_text(options.calibration) if options.calibration else recipe


def _check_calibration(subject: Model, recipe: "Recipe") -> None:
    """What can be refused before weights are read. Raises RecipeError, CheckpointError."""
    if recipe.sharing.search is not None:
        from sa_convert.search.budget import check_budget

        check_budget(Units(subject.geometry), recipe.sharing.search, recipe.origin)
    if recipe.refit == "ridge":
        check_refittable(subject.checkpoint, subject.family, subject.geometry)


def _calibrate(
    subject: Model,
    recipe: "Recipe",
    sharing: SharingMap | None,
    options: ConvertOptions,
    announce: Announce,
    refits: bool = True,
) -> "Calibrated":
    from sa_convert.console.amounts import human_bytes
    from sa_convert.search.calibration import calibrate

    announce("loading the model to calibrate it")
    with trusting(subject.checkpoint.folder, subject.checkpoint.trusted):
        found = calibrate(
            subject.checkpoint, subject.family, subject.geometry, recipe, sharing, options.device, options.dtype,
            options.layer_by_layer, refits, announce,
        )  # fmt: skip
    announce(f"calibrated; peak memory {human_bytes(peak_memory())}")
    return found


def _validate(
    conversion: ConversionPlan, recipe: "Recipe", options: ConvertOptions, stage: Stage, announce: Callable[[str], None]
) -> Validation:
    from sa_convert.measure.quality.gate import refuse_if_failed, validate
    from sa_convert.models.placement import NO_MEMORY
    from sa_convert.texts.text import load_text

    announce("validating")
    with trusting(conversion.checkpoint.folder, conversion.checkpoint.trusted):
        validation = validate(
            conversion.checkpoint.folder,
            stage.folder,
            load_text(recipe.calibration.text),
            recipe.gate.max_perplexity_increase,
            options.device,
            options.dtype,
            max_memory=NO_MEMORY if options.layer_by_layer else None,
        )
    refuse_if_failed(validation)
    return validation


def _report(
    conversion: ConversionPlan, written: Written, validation: Validation | None, recipe_name: str | None
) -> Report:
    """Sizes are those of the files as written, and of a real cache where one was measured."""
    checkpoint = conversion.checkpoint
    code = checkpoint.code if checkpoint.trusted else ()
    savings: Savings = replace(
        conversion.savings, checkpoint_bytes=Change(checkpoint.weight_bytes, written.total_bytes)
    )
    if validation is not None:
        savings = replace(savings, cache_bytes_per_token=validation.cache_bytes_per_token)
    return Report(
        base_model=BaseModel.of(checkpoint.identity, checkpoint.revision).with_code(code),
        family=conversion.family.model_type,
        sharing=conversion.sharing,
        reused_groups=conversion.reused_groups,
        total_groups=conversion.geometry.total_groups,
        savings=savings,
        perplexity=validation.perplexity if validation else None,
        decode_check=validation.decode_check if validation else None,
        gate=validation.gate if validation else None,
        copying=validation.copying if validation else None,
        agreement=validation.agreement if validation else None,
        recipe=recipe_name,
        versions=installed_versions(),
        auto_class=auto_class_name(checkpoint.config),
    )


def _publish(report: Report, conversion: ConversionPlan, recipe: "Recipe", stage: Stage) -> None:
    from sa_convert.plan.recipe_file import dump_recipe
    from sa_convert.present.charts import map_figure as figure
    from sa_convert.present.files.card import write_card

    resolved = dump_recipe(recipe, conversion.sharing)
    (stage.folder / RECIPE_FILE).write_text(resolved, encoding="utf-8")
    write_report(report, stage.folder)
    figure.sharing_figure(conversion.sharing, conversion.geometry, stage.folder / figure.FILE)
    card = conversion.checkpoint.folder / "README.md"
    write_card(report, resolved, stage.folder, card if card.exists() else None)
    stage.publish()
