"""Whether an output folder can be written: what is there already, and the room it needs."""

import json
import os
from pathlib import Path
from typing import Any

from sa_convert.errors import OutputError


def check_destination(destination: Path, overwrite: bool) -> None:
    """Raises OutputError if the destination (absolute) cannot be made, or holds what must not be lost."""
    parent = destination.parent
    if not destination.name:
        raise OutputError(f"{destination}: is no place for an output folder; use another -o.")
    if not parent.exists():
        raise OutputError(f"{parent}: there is no such folder to write '{destination.name}' into; make it first.")
    if not parent.is_dir():
        raise OutputError(f"{parent}: is a file, so nothing can be written into it; use another -o.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: you may not write there; use another -o.")
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        kind = "a link" if destination.is_symlink() else "a file"
        raise OutputError(f"{destination}: exists and is {kind}, which is never replaced; use another -o.")
    if not overwrite:
        raise OutputError(f"{destination}: exists already; use --overwrite or another -o.")
    if any(destination.iterdir()) and not _is_output(destination):
        raise OutputError(
            f"{destination}: holds files that sa-convert did not write, so --overwrite does not replace it; "
            "use another -o."
        )


def _is_output(folder: Path) -> bool:
    """Whether sa-convert wrote this folder: a converted model or an analysis."""
    if "shared_attention" in _json(folder / "config.json"):
        return (folder / "report.json").is_file()
    if "for" in _json(folder / "report.json"):  # a conversion that carries no code
        return (folder / "recipe.yaml").is_file()
    versions = _json(folder / "analysis.json").get("versions")
    return isinstance(versions, dict) and "sa_convert" in versions and (folder / "recipe.yaml").is_file()


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none. A pipe is not read, which might wait for ever."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_source(destination: Path, source: Path | None) -> None:
    """Raises OutputError if the output would lie in the base model's folder, or the other way round."""
    if source is None:
        return
    real, base = destination.resolve(), source.resolve()
    if real == base:
        raise OutputError(f"{destination}: is the model itself; use another -o.")
    if base.is_relative_to(real):
        raise OutputError(f"{destination}: holds the model {source}, so it cannot be replaced; use another -o.")
    if base.is_dir() and real.is_relative_to(base):
        raise OutputError(f"{destination}: lies in the folder of the model {source}; use another -o.")
