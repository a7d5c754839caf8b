"""The figure of a sharing map: which KV groups of which layers lose their keys, and whose attention they use.

Pillow draws it. Matplotlib takes 0.7 s to load, and the kernel copies gigabytes of weights in that time.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.domain.stacks import place_of, stack_ranges

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

FILE = Path("figures") / "sharing.png"

BAND = 40
"""Layers side by side; deeper stacks go on below."""

# Pixels, about two for each that a page shows: a cell's side, the room left of the cells, a line of text, the margin,
# a legend entry, and the least width.
CELL, LEFT, LINE, MARGIN, ENTRY, WIDTH = 40, 112, 30, 12, 440, 900

# Heights of text: the title, other text and one number in a cell, two numbers in a cell.
TITLE, TEXT, SMALL = 26, 21, 17

# Colours that stay apart in every common kind of colour blindness, and in grey (after Okabe and Ito).
COLOURS = {
    "own": ("#e8e8e8", "own attention"),
    "source": ("#56b4e9", "own attention, used by later layers"),
    "partial": ("#f5d9a8", "some heads reuse, keys stay"),
    "reusing": ("#c04f00", "all heads reuse, keys removed"),
}


@dataclass(frozen=True)
class Cell:
    """One KV group of one layer. state: a key of COLOURS. sources: layers whose attention its heads use, by their
    numbers in the stack."""

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
            used = {source[0] for head in layer.heads_of(group) if (source := row[head])}
            sources = tuple(sorted(place_of(geometry.stacks, source)[1] for source in used))
            state = "partial" if sources else "own"
            if group not in own:
                state = "reusing"
            elif (index, group) in lenders:
                state = "source"
            found.append(Cell(index, group, state, sources))
    return tuple(found)


@dataclass(frozen=True)
class Band:
    """Layers that are drawn side by side. first: the number of the first in its stack. name: of the stack, "" if
    there is one. top: pixels above the cells. groups: KV groups of the layer that has most. numbered: the columns whose
    numbers are drawn."""

    layers: range
    first: int
    name: str
    top: int
    groups: int
    numbered: tuple[int, ...]


def _bands(geometry: ModelGeometry, above: int) -> tuple[Band, ...]:
    """Stack by stack, and the layers of a deep stack in parts as equal as can be. above: pixels above all of them."""
    bands: list[Band] = []
    for name, members in stack_ranges(geometry.stacks, len(geometry.layers)):
        parts = -(-len(members) // BAND)
        columns = -(-len(members) // parts)
        groups = max(geometry.layers[layer].groups for layer in members)
        for first in range(0, len(members), columns):
            above += LINE if name else 0
            layers = members[first : first + columns]
            numbered = _numbered([at for at, layer in enumerate(layers) if geometry.layers[layer].heads], len(layers))
            bands.append(Band(layers, first, name, above + LINE, groups, numbered))
            above += groups * CELL + 2 * LINE + MARGIN
    return tuple(bands)


def _numbered(columns: list[int], width: int) -> tuple[int, ...]:
    """Those of the columns that have room for a number: of many that touch, every other one."""
    found: list[int] = []
    for column in columns:
        if width <= 16 or not found or column > found[-1] + 1:
            found.append(column)
    return tuple(found)


def sharing_figure(sharing: SharingMap, geometry: ModelGeometry, path: Path) -> Path:
    """Draw layers (x) by KV groups (y) into `path`, which ends in .png; its folder is made if need be.

    Each stack of an encoder-decoder has a band of its own; layers without softmax attention are blank. Equal maps give
    equal bytes with one build of Pillow.
    """
    from PIL import Image, ImageDraw

    path.parent.mkdir(parents=True, exist_ok=True)
    grid = cells(sharing, geometry)
    blank = any(not layer.heads for layer in geometry.layers)
    bands = _bands(geometry, MARGIN + LINE * (3 + blank + (len({cell.state for cell in grid}) + 1) // 2))
    columns = max(len(band.layers) for band in bands)
    height = bands[-1].top + bands[-1].groups * CELL + LINE + MARGIN
    image = Image.new("RGB", (max(WIDTH, LEFT + columns * CELL + MARGIN), height), "white")
    canvas = ImageDraw.Draw(image)
    _legend(canvas, grid, blank)
    for band in bands:
        _axes(canvas, band)
    tiles: dict[tuple[str, str], Image.Image] = {}
    for cell in grid:
        look = (cell.state, cell.label)
        if look not in tiles:
            tiles[look] = Image.new("RGB", (CELL - 2, CELL - 2), COLOURS[cell.state][0])
            _number(ImageDraw.Draw(tiles[look]), cell)
        band = next(band for band in bands if cell.layer in band.layers)
        column = band.layers.index(cell.layer)
        image.paste(tiles[look], (LEFT + column * CELL + 1, band.top + cell.group * CELL + 1))
    image.save(path)
    return path


def _text(canvas: "ImageDraw", place: tuple[float, float], text: str, anchor: str, size: int, ink: str) -> None:
    """anchor: where in the text the place is, in Pillow's letters."""
    canvas.text(place, text, ink, _font(size), anchor, spacing=2, align="center")


@cache
def _font(size: int) -> "FreeTypeFont":
    """The scalable font that Pillow brings. Raises ImportError if Pillow was built without FreeType."""
    from PIL import ImageFont

    return cast("FreeTypeFont", ImageFont.load_default(size))


def _legend(canvas: "ImageDraw", grid: tuple[Cell, ...], blank: bool) -> None:
    """Title, meaning of the numbers, and of the colours that occur. blank: whether some layers are."""
    states = [cell.state for cell in grid]
    title = f"Shared attention: {states.count('reusing')} of {len(states)} KV groups reuse attention, and have no keys"
    note = "Number in a cell: source layer, or the first and the last of several"
    _text(canvas, (MARGIN, MARGIN + LINE / 2), title, "lm", TITLE, "black")
    _text(canvas, (MARGIN, MARGIN + LINE * 1.5), note, "lm", TEXT, "black")
    if blank:
        _text(canvas, (MARGIN, MARGIN + LINE * 2.5), "Blank: layer without softmax attention", "lm", TEXT, "black")
    for index, (colour, meaning) in enumerate(entry for state, entry in COLOURS.items() if state in states):
        row, column = divmod(index, 2)
        x, y = MARGIN + column * ENTRY, MARGIN + LINE * (2 + blank + row)
        canvas.rectangle((x, y + 5, x + CELL - 1, y + LINE - 6), colour)
        _text(canvas, (x + CELL + 8, y + LINE / 2), meaning, "lm", TEXT, "black")


def _axes(canvas: "ImageDraw", band: Band) -> None:
    """Names and numbers around the cells of a band."""
    right, top, bottom = LEFT - 10, band.top, band.top + band.groups * CELL
    _text(canvas, (MARGIN, top - LINE * 1.5), band.name, "lm", TITLE, "black")
    _text(canvas, (right, top - LINE / 2), "KV group", "rm", TEXT, "black")
    for group in range(0, band.groups, 1 if band.groups <= 16 else 4):
        _text(canvas, (right, top + (group + 0.5) * CELL), str(group), "rm", TEXT, "black")
    _text(canvas, (right, bottom + LINE / 2), "layer", "rm", TEXT, "black")
    for column in band.numbered:
        place = (LEFT + (column + 0.5) * CELL, bottom + LINE / 2)
        _text(canvas, place, str(band.first + column), "mm", TEXT, "black")


def _number(canvas: "ImageDraw", cell: Cell) -> None:
    size, y = (SMALL, CELL / 2 - 3) if "\n" in cell.label else (TEXT, CELL / 2 - 1)
    ink = "white" if cell.state == "reusing" else "black"
    _text(canvas, (CELL / 2 - 1, y), cell.label, "mm", size, ink)
