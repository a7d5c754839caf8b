"""Progress bars: always on stderr, gone when the work is done."""

import sys
from collections.abc import Iterable
from typing import Any

from sa_convert.console.printable import one_line


def progress(total: int | None, description: str, unit: str = "it", **options: Any) -> Any:
    """A tqdm bar (usable as a context manager) over `total` units of work, or an unknown amount with None."""
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, file=sys.stderr, leave=False, dynamic_ncols=True, **options)


def progress_bytes(total: int, description: str) -> Any:
    """A bar that counts bytes."""
    return progress(total, description, unit="B", unit_scale=True, unit_divisor=1024)


def peak_memory() -> int:
    """The most bytes of memory that this process has had so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def announce(step: str) -> None:
    """Tell on stderr, in a few words, what is being done."""
    tell(f"{one_line(step)} ...")


def tell(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr)


def note(text: str) -> None:
    """One line on stderr that users should read, though the work goes on."""
    tell(f"Note: {text}")


def notes(of: str, texts: Iterable[str]) -> None:
    """What is to be said of a model, a line each."""
    for text in texts:
        note(f"{of}: {text}")
