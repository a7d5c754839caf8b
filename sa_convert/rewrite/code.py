"""The code that a converted model carries with it."""

from pathlib import Path

import sa_convert.export

HOME = Path(sa_convert.export.__file__).parent


def write_code(folder: Path) -> None:
    """Copy every module of `sa_convert.export` into `folder`, byte for byte."""
    for file in sorted(HOME.glob("*.py")):
        if file.name != "__init__.py":
            (folder / file.name).write_bytes(file.read_bytes())
