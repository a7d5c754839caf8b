"""The figure of a sharing map: which KV groups of which layers lose their keys, and whose attention they use."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_convert.data.geometry import ModelGeometry
from sa_convert.data.sharing_map import SharingMap

FILE = Path("figures") / "sharing.png"

BAND = 40
"""Layers side by side; deeper models go on below."""

# Inches: a cell's side, room left of the cells, below them, and above the first ones.
CELL, LEFT, BELOW, ABOVE = 0.27, 0.55, 0.55, 0.75

# Colours that stay apart in every common kind of colour blindness, and in grey (Okabe and Ito, lightened).
COLOURS = {
    "own": ("#ececec", "own attention"),
    "source": ("#56b4e9", "own attention, used by later layers"),
    "partial": ("#f5d9a8", "some heads reuse, keys stay"),
    "reusing": ("#d55e00", "all heads reuse, keys removed"),
}


@dataclass(frozen=True)
class Cell:
    """One KV group of one layer. state: a key of COLOURS. sources: layers whose attention its heads use."""

    layer: int
    group: int
    state: str
    sources: tuple[int, ...]

    @property
    def label(self) -> str:
        """The source layer, or the first and the last of several."""
        ends = dict.fromkeys((self.sources[0], self.sources[-1])) if self.sources else {}
        return "\n".join(map(str, ends))


def cells(sharing: SharingMap, geometry: ModelGeometry) -> tuple[Cell, ...]:
    """Every KV group of the model, layer by layer."""
    lenders = {
        (layer, geometry.layers[layer].group_of(head))
        for row in sharing.layers.values()
        for layer, head in filter(None, row)
    }
    found = []
    for index, layer in enumerate(geometry.layers):
        own = sharing.own_groups(index, layer)
        row = sharing.layers.get(index, (None,) * layer.heads)
        for group in range(layer.groups):
            sources = tuple(sorted({source[0] for head in layer.heads_of(group) if (source := row[head])}))
            state = "partial" if sources else "own"
            if group not in own:
                state = "reusing"
            elif (index, group) in lenders:
                state = "source"
            found.append(Cell(index, group, state, sources))
    return tuple(found)


def sharing_figure(sharing: SharingMap, geometry: ModelGeometry, path: Path) -> Path:
    """Draw layers (x) by KV groups (y) into a PNG at `path`; its folder is made if need be.

    Equal maps give equal bytes with one version of matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    layers, groups = len(geometry.layers), max(layer.groups for layer in geometry.layers)
    bands = -(-layers // BAND)
    columns = -(-layers // bands)
    width = max(6.5, columns * CELL + LEFT + 0.1)
    height = bands * (groups * CELL + BELOW) + ABOVE
    grid = cells(sharing, geometry)
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        for band in range(bands):
            first, last = band * columns, min(layers, (band + 1) * columns)
            bottom = height - ABOVE - groups * CELL - band * (groups * CELL + BELOW)
            box = (LEFT / width, bottom / height, (last - first) * CELL / width, groups * CELL / height)
            _draw(figure.add_axes(box), [cell for cell in grid if first <= cell.layer < last], first, last, groups)
        _legend(figure, grid)
        figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _draw(axes: Any, grid: list[Cell], first: int, last: int, groups: int) -> None:
    """The layers from `first` up to but not including `last`."""
    from matplotlib.collections import PolyCollection

    squares = [
        [(x + dx, y + dy) for dx, dy in ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5))]
        for x, y in ((cell.layer, cell.group) for cell in grid)
    ]
    colours = [COLOURS[cell.state][0] for cell in grid]
    axes.add_collection(PolyCollection(squares, facecolors=colours, edgecolors="white", linewidths=1.2))
    for cell in grid:
        if cell.label:
            ink = "white" if cell.state == "reusing" else "black"
            size = 5 if "\n" in cell.label else 7
            axes.text(cell.layer, cell.group, cell.label, color=ink, size=size, ha="center", va="center", linespacing=1)
    axes.set(xlim=(first - 0.5, last - 0.5), ylim=(groups - 0.5, -0.5))
    axes.set_xlabel("layer", size=8, labelpad=2)
    axes.set_ylabel("KV group", size=8, labelpad=2)
    axes.set_xticks(range(first, last, 1 if last - first <= 16 else 2))
    axes.set_yticks(range(0, groups, 1 if groups <= 16 else 4))
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)


def _legend(figure: Any, grid: tuple[Cell, ...]) -> None:
    from matplotlib.patches import Patch

    used = {cell.state for cell in grid}
    figure.legend(
        handles=[Patch(facecolor=colour, label=text) for state, (colour, text) in COLOURS.items() if state in used],
        loc="upper left",
        ncols=2,
        frameon=False,
        fontsize=8,
        title="Number in a cell: source layer, or the first and the last of several",
        title_fontsize=8,
        alignment="left",
    )
