"""A folder that was converted for an engine, without code: an ordinary model to transformers, a conversion by its
report.json. One with code is known by its config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_convert.errors import CheckpointError
from sa_convert.read.folder import read_json

REPORT = "report.json"


def stock_told(folder: Path) -> Mapping[str, Any] | None:
    """What report.json says under "for"; None if the folder is no such conversion."""
    return told_for(_report(folder))


def told_for(report: Any) -> Mapping[str, Any] | None:
    """The same of what report.json holds."""
    found = report.get("for") if isinstance(report, Mapping) else None
    told = isinstance(found, Mapping) and "layers" in found and isinstance(report.get("family"), str)
    return found if told else None


def base_type_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The model type of a model, or of what it was made of if it was converted for an engine and has no code."""
    report = _report(folder)
    return str(report["family"] if told_for(report) is not None else config.get("model_type"))


def _report(folder: Path) -> Any:
    file = folder / REPORT
    if not file.is_file():
        return None
    try:
        return read_json(file)
    except CheckpointError:
        return None
