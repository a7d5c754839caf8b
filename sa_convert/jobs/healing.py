"""What `sa-convert heal` does: train a converted model towards its base, and write it anew."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.console.progress import announce
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.model import Model, RunOptions
from sa_convert.domain.plan import Plan
from sa_convert.domain.report import Report
from sa_convert.errors import CheckpointError, GateRefused, RecipeError, SaConvertError
from sa_convert.families.family import PREFIX
from sa_convert.heal.resolved_settings import resolve
from sa_convert.output.disk_space import check_space
from sa_convert.output.replaceable import check_destination, check_source
from sa_convert.output.signals import termination_as_exit
from sa_convert.output.staging import Stage, staging
from sa_convert.plan.audited import foreign_code
from sa_convert.plan.conversion import ConversionPlan, conversion_of, resolved_recipe
from sa_convert.plan.converted import converted_parts
from sa_convert.read.folder import open_folder, read_json
from sa_convert.read.open_model import complete
from sa_convert.read.stock_folder import base_type_of, stock_told
from sa_convert.read.work_on import describe
from sa_convert.rewrite.overwrite import overwrite_tensors

if TYPE_CHECKING:
    from sa_convert.domain.heal_settings import HealSettings
    from sa_convert.domain.recipe import Recipe
    from sa_convert.heal.distillation import Healed

RECIPE, REPORT = "recipe.yaml", "report.json"
_ROOM = 64 * 1024 * 1024
"""Bytes for what is written beside weights."""
_COMPARED = 1 << 16
"""Bytes of each tensor by which a base is known."""


@dataclass(frozen=True, kw_only=True)
class HealOptions(RunOptions):
    """How to heal an existing conversion."""

    against: str | None = None
    """The base; None: as report.json names it."""

    resume: bool = False
    """Go on with a run that was interrupted."""

    accumulate: int = 1
    """Parts in which the rows of a step go through a process."""

    validate: bool = True
    max_perplexity_increase: float | None = None
    """The gate, a fraction; None: that of the recipe in the folder."""

    overwrite: bool = False


def heal_folder(reference: str, output: Path, settings: "HealSettings", options: HealOptions) -> Report | None:
    """Heal the converted model in the folder `reference` into the folder `output`, which appears complete or not at
    all.

    Every process of an `accelerate launch` calls it; None is the result of all but the first. Raises a SaConvertError:
    GateRefused if the result is worse than before, CheckpointError for a model or a base that cannot be used.
    """
    with _silent_unless_first(), termination_as_exit():
        # 1. The converted model, its plan and its base, from headers.
        output = Path(os.path.abspath(output))
        checkpoint = _converted(reference, options)
        converted, plan = converted_parts(checkpoint)
        base = base_of(checkpoint, options)
        recipe = _recipe(checkpoint.folder, plan, base)
        conversion = conversion_of(base, plan, recipe)
        check_base(conversion, checkpoint)
        settings = resolve(settings, recipe, conversion, options=True)

        # 2. Room, and a place for the result.
        state = output.with_name(f"{output.name}.healing")
        if _first():
            check_source(output, checkpoint.folder)
            check_source(output, base.checkpoint.folder)
            check_destination(output, options.overwrite)
            check_space(output, _needed(checkpoint))

        # 3. Training, in a folder beside the result, which an interrupted run leaves behind.
        healed = _trained(converted, plan, base, settings, options, state)
        if not _first():
            return None
        if healed.report.kept is None:
            shutil.rmtree(state, ignore_errors=True)
            raise GateRefused(
                f"Healing was refused, and nothing written: after {healed.report.tokens:,} tokens the model is worse "
                f"than before: {'; '.join(healed.report.refused)}. Try other --text, a lower --rate, or more --tokens."
            )

        # 4. A copy of the folder, in which the bytes of changed tensors are new.
        with staging(output, options.overwrite, _needed(checkpoint), checkpoint.folder) as stage:
            announce("writing weights")
            shutil.copytree(checkpoint.folder, stage.folder, dirs_exist_ok=True)
            overwrite_tensors(checkpoint, stage.folder, healed.tensors)

            # 5. Both models run, and the folder appears.
            try:
                report = _finish(conversion, checkpoint, recipe.with_heal(settings), healed, options, stage)
            except GateRefused as error:
                raise GateRefused(
                    f"{error} What was trained is kept in {state}: the same command with --resume and another gate "
                    "writes it."
                ) from None
        shutil.rmtree(state, ignore_errors=True)
    return report


def _trained(
    converted: Model, plan: Plan, base: Model, settings: "HealSettings", options: HealOptions, state: Path
) -> "Healed":
    """Raises SaConvertError with what to do if the user interrupts a run that can go on."""
    from sa_convert.heal.distillation import HealingTask, heal

    announce("loading both models")
    task = HealingTask(
        converted=converted,
        plan=plan,
        base=base.checkpoint,
        settings=settings,
        run=options,
        state=state,
        resume=options.resume,
        accumulate=options.accumulate,
    )
    try:
        return heal(task)
    except BaseException as error:
        if not list(state.glob("checkpoint-*")) and not options.resume:  # nothing to go on with
            shutil.rmtree(state, ignore_errors=True)
            raise
        if not _first() or not isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise SaConvertError(
            f"Interrupted. The state at the last judgement, and the best so far, are in {state}: the same command with "
            "--resume goes on."
        ) from None


def _finish(
    conversion: ConversionPlan,
    checkpoint: Checkpoint,
    recipe: "Recipe",
    healed: "Healed",
    options: HealOptions,
    stage: Stage,
) -> Report:
    from sa_convert.jobs.converting import publish, report_of, validated
    from sa_convert.rewrite.shards import Written

    if options.max_perplexity_increase is not None:
        recipe = recipe.with_gate(options.max_perplexity_increase)
    validation = validated(conversion, recipe, options, stage) if options.validate else None
    old = read_json(checkpoint.folder / REPORT) if (checkpoint.folder / REPORT).is_file() else {}
    files = {shard.file.name: shard.file.stat().st_size for shard in checkpoint.shards}
    tensors = checkpoint.tensors.values()
    written = Written(files, sum(one.bytes for one in tensors), sum(one.elements for one in tensors))
    report = report_of(conversion, written, validation, old.get("recipe"))
    report = replace(report, heal=healed.report, kept={"refit": old["refit"]} if old.get("refit") else {})
    publish(report, conversion, recipe, stage)
    return report


def _converted(reference: str, options: HealOptions) -> Checkpoint:
    """Raises CheckpointError if it is no folder of a converted model, or its code is not ours and not trusted."""
    checkpoint = open_folder(Path(reference), reference)
    if not str(checkpoint.config.get("model_type")).startswith(PREFIX) and stock_told(checkpoint.folder) is None:
        raise CheckpointError(f"{reference}: is not a converted model: convert it first.")
    if not options.trust and (fault := foreign_code(checkpoint)):
        raise CheckpointError(
            f"{reference}: {fault}, and loading the model would run it: "
            "look at the code, then use --trust-remote-code, or convert the model again."
        )
    return checkpoint


def base_of(checkpoint: Checkpoint, options: HealOptions) -> Model:
    """The base of a converted model. Raises CheckpointError if it is not known where it is."""
    reference = options.against
    if reference is None:
        file = checkpoint.folder / REPORT
        named = (read_json(file).get("base_model") or {}).get("id") if file.is_file() else None
        places = [Path(named), checkpoint.folder.resolve().parent / named] if isinstance(named, str) and named else []
        found = next((path for path in places if (path / "config.json").is_file()), None)
        if found is None:
            told = f"its report.json names '{named}', which is no folder here" if named else "it has no report.json"
            raise CheckpointError(
                f"{checkpoint.identity}: healing needs the base model, and {told}: give it with --against."
            )
        reference = str(found)
    described = describe(reference, options)
    if not described.checkpoint.is_safetensors:
        raise CheckpointError(f"{reference}: healing needs the base model as safetensors in a folder.")
    made = complete(described.checkpoint, reference, checkpoint.folder)
    return replace(described, checkpoint=made)


def check_base(conversion: ConversionPlan, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the converted model is one of this base: tensors of layers that the plan leaves
    alone have the same shapes, and begin with the same bytes."""
    base = conversion.model.checkpoint
    wrong = f"{base.identity}: is not the base of {checkpoint.identity}:"
    if conversion.model.family.model_type != base_type_of(checkpoint.folder, checkpoint.config).removeprefix(PREFIX):
        raise CheckpointError(f"{wrong} it is a {base.config.get('model_type')}.")
    touched = _layer_starts(conversion)
    for name, tensor in base.tensors.items():
        if name.startswith(touched) or name in conversion.edits:
            continue
        found = checkpoint.tensors.get(name)
        if found is None or found.shape != tensor.shape:
            raise CheckpointError(f"{wrong} tensor '{name}' should be {tensor.shape} there.")
        if _start(tensor) != _start(found):
            raise CheckpointError(f"{wrong} tensor '{name}' has other values.")


def _layer_starts(conversion: ConversionPlan) -> tuple[str, ...]:
    """How tensors of layers begin that a conversion, or a healing before, may have changed."""
    from sa_convert.read.names import layers_prefix, stack_of
    from sa_convert.treatments.registry import lenders

    model, plan = conversion.model, conversion.plan
    layers = {*plan.layers, *(lender for _, (lender, _) in lenders(plan, model.geometry))}
    places = [stack_of(model.family, model.geometry.stacks, layer) for layer in layers]
    return tuple(f"{layers_prefix(model.checkpoint, model.family, stack)}.{number}." for stack, number in places)


def _start(tensor: Any) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        found: bytes = file.read(min(tensor.bytes, _COMPARED))
    return found


def _recipe(folder: Path, plan: Plan, base: Model) -> "Recipe":
    """The recipe in a converted folder, or, if there is none that can be read, one with its plan."""
    from sa_convert.domain.recipe import Recipe
    from sa_convert.plan.recipe_file import load_recipe

    try:
        return load_recipe(str(folder / RECIPE))
    except RecipeError:
        return resolved_recipe(Recipe(plan={0: "none"}), plan, base.geometry)


def _needed(checkpoint: Checkpoint) -> int:
    return checkpoint.weight_bytes + _ROOM


def _first() -> bool:
    """Whether this process tells and writes: of several, the first."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _silent_unless_first() -> Iterator[None]:
    if _first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield
