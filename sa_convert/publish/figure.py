"""The figure of a sharing map: which KV groups of which layers lose their keys, and whose attention they use.

Pillow draws it. Matplotlib takes 0.7 s to load, and the kernel copies gigabytes of weights in that time.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sa_convert.data.geometry import ModelGeometry
from sa_convert.data.sharing_map import SharingMap

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

FILE = Path("figures") / "sharing.png"

BAND = 40
"""Layers side by side; deeper models go on below."""

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
    """Draw layers (x) by KV groups (y) into `path`, which ends in .png; its folder is made if need be.

    Equal maps give equal bytes with one build of Pillow.
    """
    from PIL import Image, ImageDraw

    path.parent.mkdir(parents=True, exist_ok=True)
    grid = cells(sharing, geometry)
    layers, groups = len(geometry.layers), max(layer.groups for layer in geometry.layers)
    bands = -(-layers // BAND)
    columns = -(-layers // bands)
    above = MARGIN + LINE * (3 + (len({cell.state for cell in grid}) + 1) // 2)
    pitch = groups * CELL + 2 * LINE + MARGIN
    image = Image.new("RGB", (max(WIDTH, LEFT + columns * CELL + MARGIN), above + bands * pitch), "white")
    canvas = ImageDraw.Draw(image)
    _legend(canvas, grid)
    for band in range(bands):
        first = band * columns
        _axes(canvas, above + band * pitch + LINE, range(first, min(layers, first + columns)), groups)
    tiles: dict[tuple[str, str], Image.Image] = {}
    for cell in grid:
        look = (cell.state, cell.label)
        if look not in tiles:
            tiles[look] = Image.new("RGB", (CELL - 2, CELL - 2), COLOURS[cell.state][0])
            _number(ImageDraw.Draw(tiles[look]), cell)
        band, column = divmod(cell.layer, columns)
        corner = (LEFT + column * CELL + 1, above + band * pitch + LINE + cell.group * CELL + 1)
        image.paste(tiles[look], corner)
    image.save(path)
    return path


def _text(canvas: "ImageDraw", place: tuple[float, float], text: str, anchor: str, size: int, ink: str) -> None:
    """anchor: where in the text the place is, in Pillow's letters."""
    canvas.text(place, text, ink, _font(size), anchor, spacing=2, align="center")


@cache
def _font(size: int) -> "FreeTypeFont":
    """The scalable font that Pillow brings. Raises ImportError where Pillow was built without FreeType."""
    from PIL import ImageFont

    return cast("FreeTypeFont", ImageFont.load_default(size))


def _legend(canvas: "ImageDraw", grid: tuple[Cell, ...]) -> None:
    """Title, meaning of the numbers, and of the colours that occur."""
    states = [cell.state for cell in grid]
    title = f"Shared attention: {states.count('reusing')} of {len(states)} KV groups reuse attention, and have no keys"
    note = "Number in a cell: source layer, or the first and the last of several"
    _text(canvas, (MARGIN, MARGIN + LINE / 2), title, "lm", TITLE, "black")
    _text(canvas, (MARGIN, MARGIN + LINE * 1.5), note, "lm", TEXT, "black")
    for index, (colour, meaning) in enumerate(entry for state, entry in COLOURS.items() if state in states):
        row, column = divmod(index, 2)
        x, y = MARGIN + column * ENTRY, MARGIN + LINE * (2 + row)
        canvas.rectangle((x, y + 5, x + CELL - 1, y + LINE - 6), colour)
        _text(canvas, (x + CELL + 8, y + LINE / 2), meaning, "lm", TEXT, "black")


def _axes(canvas: "ImageDraw", top: int, layers: range, groups: int) -> None:
    """Names and numbers around the cells of some layers. top: of the cells."""
    right, bottom = LEFT - 10, top + groups * CELL
    _text(canvas, (right, top - LINE / 2), "KV group", "rm", TEXT, "black")
    for group in range(0, groups, 1 if groups <= 16 else 4):
        _text(canvas, (right, top + (group + 0.5) * CELL), str(group), "rm", TEXT, "black")
    _text(canvas, (right, bottom + LINE / 2), "layer", "rm", TEXT, "black")
    for column in range(0, len(layers), 1 if len(layers) <= 16 else 2):
        place = (LEFT + (column + 0.5) * CELL, bottom + LINE / 2)
        _text(canvas, place, str(layers[column]), "mm", TEXT, "black")


def _number(canvas: "ImageDraw", cell: Cell) -> None:
    size, y = (SMALL, CELL / 2 - 3) if "\n" in cell.label else (TEXT, CELL / 2 - 1)
    ink = "white" if cell.state == "reusing" else "black"
    _text(canvas, (CELL / 2 - 1, y), cell.label, "mm", size, ink)
