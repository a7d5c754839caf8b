"""Whether there is room on the disk, before the first byte is written."""

import shutil
from pathlib import Path

from sa_convert.console.amounts import human_bytes
from sa_convert.errors import OutputError


def check_space(destination: Path, needed: int) -> None:
    """Raises OutputError unless `needed` bytes are free beside the destination."""
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise OutputError(
            f"{destination}: needs {human_bytes(needed)} of disk space, but {human_bytes(free)} are free there; "
            "make room or use another -o."
        )


def require_space(folder: Path, needed: int, what: str, instead: str) -> None:
    """Raises OutputError unless `needed` bytes are free where a folder of temporary files lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{what} take {human_bytes(needed)} of temporary files, but {human_bytes(free)} are free in "
            f"{folder.parent}: make room, set TMPDIR to a folder with more, or use {instead}."
        )
