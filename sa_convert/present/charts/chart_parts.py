"""What the charts of an analysis have in common: paper, colours, and the writing of files.

Matplotlib is used through its objects, never through pyplot, so that nothing outside of a figure changes. Colours are
those of viridis and of Okabe and Ito, which stay apart in every common kind of colour blindness; no meaning rests on
colour alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.analysis import Matrix

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8c8c8c"
NOTHING = "#d9d9d9"
"""Of a cell without a value."""


def save(draw: "Callable[[], Figure]", path: Path) -> Path:
    """Draw a figure in matplotlib's own style, whatever the user's is, and write it as PNG."""
    from matplotlib import style

    path.parent.mkdir(parents=True, exist_ok=True)
    with style.context("default"):
        # Without the version of matplotlib in it, which would make equal figures differ.
        draw().savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    return path


def paper(title: str, width: float, height: float) -> "Figure":
    """An empty figure. width, height: inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def array(matrix: Matrix) -> "numpy.ndarray":
    """The matrix with NaN for None, and for what short rows lack."""
    import numpy

    width = max(len(row) for row in matrix)
    rows = [[*row, *[None] * (width - len(row))] for row in matrix]
    return numpy.array([[numpy.nan if value is None else value for value in row] for row in rows], dtype=float)


def numbers(axes: "Axes", cells: dict[tuple[int, int], int], colour_at: Callable[[int], Any]) -> None:
    """A number in the middle of each cell (x, y), dark on light colours and white on dark ones."""
    for (x, y), value in cells.items():
        red, green, blue, _ = colour_at(value)
        ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
        axes.text(x, y, str(value), ha="center", va="center", fontsize=8, color=ink)
