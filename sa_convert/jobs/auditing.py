"""The job of `sa-convert audit`: is the code in a converted model's folder what sa-convert wrote there?"""

from dataclasses import dataclass
from pathlib import Path

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError
from sa_convert.families.family import PREFIX
from sa_convert.plan.audited import CONFIGS, AuditedFile, audit_code, foreign_code, missing_code
from sa_convert.read.hub_download import download_file
from sa_convert.read.hub_names import HubName
from sa_convert.read.open_model import open_model
from sa_convert.read.side_files import is_code
from sa_convert.read.stock_folder import REPORT, stock_told


@dataclass(frozen=True)
class Audit:
    """model: as the user called it. files: every Python file in the folder. missing: files without which it does not
    load. fault: what is wrong in one sentence, or None. engine: what it was written for without code; None: it has
    some."""

    model: str
    files: tuple[AuditedFile, ...]
    missing: tuple[str, ...]
    fault: str | None
    engine: str | None = None


def audit(reference: str) -> Audit:
    """Audit a folder, or a model on the Hub, of which only code and configuration are downloaded. Nothing is run.

    Raises CheckpointError if it is no converted model or cannot be read.
    """
    # 1. Find the folder, from headers alone.
    checkpoint = open_model(reference)
    if Path(REPORT) in checkpoint.absent:
        download_file(HubName(checkpoint.identity, checkpoint.revision), REPORT)
    stock = stock_told(checkpoint.folder)
    if stock is None and not str(checkpoint.config.get("model_type")).startswith(PREFIX):
        raise CheckpointError(
            f"{reference}: is no converted model (its model_type is '{checkpoint.config.get('model_type')}'), so "
            "sa-convert wrote no code for it."
        )
    # 2. Fetch the code of a model on the Hub that is not in the cache yet.
    _fetch_code(checkpoint)
    # 3. Compare every file with what this version, or an earlier one, writes.
    files, missing = audit_code(checkpoint), missing_code(checkpoint)
    # 4. Look at what transformers would run besides.
    fault = foreign_code(checkpoint)
    if fault is None and missing:
        fault = f"its code {missing[0]} is missing"
    if fault is None and not files and stock is None:
        fault = "it has no code"
    return Audit(reference, tuple(files), tuple(missing), fault, str(stock.get("engine")) if stock else None)


def _fetch_code(checkpoint: Checkpoint) -> None:
    name = HubName(checkpoint.identity, checkpoint.revision)
    for path in checkpoint.absent:
        if is_code(path) or path in map(Path, CONFIGS):
            download_file(name, path.as_posix())
