"""Whether a folder is a complete conversion, just as `sa-convert convert` left it, and of which files it consists."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_convert.console.amounts import format_percent
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError, GateRefused, OutputError, SaConvertError
from sa_convert.families.family import PREFIX
from sa_convert.plan.audited import audit_code, foreign_code, missing_code
from sa_convert.plan.conversion import treated_by
from sa_convert.plan.converted import converted_parts
from sa_convert.present.charts import plan_figure as figure
from sa_convert.present.files import card
from sa_convert.present.files import report_file as report
from sa_convert.read.folder import INDEX, open_folder, read_json
from sa_convert.read.inside import check_inside
from sa_convert.read.stock_folder import stock_told

RECIPE_FILE = "recipe.yaml"
_WRITTEN = (card.FILE, RECIPE_FILE, report.FILE)
"""What publishing adds to the model, besides its figure."""


@dataclass(frozen=True)
class Conversion:
    """folder: links resolved. files: all that the conversion consists of, relative to it, sorted. left_out: other files
    that lie there, but hidden ones. size: bytes of the files."""

    folder: Path
    files: tuple[Path, ...]
    left_out: tuple[Path, ...]
    size: int


def complete_conversion(folder: Path, allow_unvalidated: bool = False) -> Conversion:
    """The conversion in a folder, from headers alone.

    allow_unvalidated: accept a folder that was converted with --no-validate. Raises CheckpointError if a file is
    missing, damaged or not the one that the conversion wrote, OutputError if it was not validated, and GateRefused
    if its gate did not pass.
    """
    checkpoint = open_folder(folder)
    sections, drawn = _check_model(checkpoint)
    root, written = folder.resolve(), (*_WRITTEN, drawn.as_posix())
    for name in written:
        check_inside(folder / name, root, "a file that every conversion has")
    _check_report(folder, checkpoint, read_json(folder / report.FILE), sections, allow_unvalidated)
    files = tuple(sorted({*_files(checkpoint, root), *map(Path, written)}))
    present = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    shown = {path for path in present if not any(part.startswith(".") for part in path.parts)}
    size = sum((root / path).stat().st_size for path in files)
    return Conversion(root, files, tuple(sorted(shown - set(files))), size)


def _check_model(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], Path]:
    """Configuration, plan and code. Returns what report.json should say of the plan, and where its figure should be."""
    folder, config = checkpoint.folder, checkpoint.config
    ours = str(config.get("model_type")).startswith(PREFIX) and isinstance(config.get("shared_attention"), dict)
    if not ours and stock_told(folder) is None:
        raise CheckpointError(
            f"{folder}: is no conversion: its config.json has no 'shared_attention'; run 'sa-convert convert' first."
        )
    try:
        model, plan = converted_parts(checkpoint)
    except SaConvertError as error:
        raise CheckpointError(f"{folder}: {error} Convert the model again.") from error
    fault = foreign_code(checkpoint)
    if missing := missing_code(checkpoint):
        fault = f"its code {missing[0]} is missing"
    if fault is not None:
        raise CheckpointError(f"{folder}: {fault}; convert the model again.")
    sections = {key: value for treated in treated_by(plan, model) for key, value in treated.section.items()}
    return sections, figure.file_for(plan.treatments)


def _check_report(
    folder: Path,
    checkpoint: Checkpoint,
    content: Mapping[str, Any],
    sections: Mapping[str, Any],
    allow_unvalidated: bool,
) -> None:
    """That the report is of this model, and what it says of its quality."""
    file = folder / report.FILE
    try:
        told = {key: content[key] for key in sections}
        written = content["savings"]["checkpoint_bytes"]["after"]
        gate, check, perplexity = content["gate"], content["decode_check"], content["perplexity"]
        passed = gate and gate["passed"] is True
        limit = gate and format_percent(gate["max_perplexity_increase"])
        decodes = check is None or (
            check["same_greedy_tokens"] is True and check["max_abs_logit_difference"] <= check["tolerance"]
        )
        increase = perplexity and f"{perplexity['increase']:+.2%}"
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise CheckpointError(f"{file}: is not as sa-convert writes it; convert the model again.") from None
    if told != sections:
        raise CheckpointError(f"{file}: reports another plan than config.json has; convert the model again.")
    size = sum(shard.file.stat().st_size for shard in checkpoint.shards)
    if size != written:
        raise CheckpointError(
            f"{folder}: its weight files have {size} bytes, but {report.FILE} says that {written} were written and "
            "validated; convert the model again."
        )
    if not gate or not perplexity:
        if allow_unvalidated and not gate and not perplexity:
            return
        raise OutputError(
            f"{folder}: was converted with --no-validate, so nothing is known of its quality; convert it with "
            "validation, or push it nevertheless with --allow-unvalidated."
        )
    if not passed:
        raise GateRefused(
            f"{folder}: its perplexity changes by {increase}, more than its limit of {limit}; convert it again with a "
            "gentler recipe."
        )
    if not decodes:
        raise GateRefused(f"{folder}: decodes otherwise with a cache than without; convert the model again.")


def _files(checkpoint: Checkpoint, root: Path) -> Iterator[Path]:
    """Relative paths. Raises CheckpointError for links that lead out of the folder."""
    yield from checkpoint.side_files
    yield from (shard.file.relative_to(checkpoint.folder) for shard in checkpoint.shards)
    if checkpoint.index is not None:
        yield Path(INDEX)
    yield Path("config.json")
    for code in audit_code(checkpoint):
        check_inside(root / code.name, root, "the code")
        yield Path(code.name)
