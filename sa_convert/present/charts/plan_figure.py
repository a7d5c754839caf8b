"""The figure of a plan: what is done to which KV groups of which layers, in the looks that treatments give them.

Pillow draws it. Matplotlib takes 0.7 s to load, and the kernel copies gigabytes of weights in that time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.stacks import stack_ranges
from sa_convert.domain.treated import Drawing, Look
from sa_convert.treatments.registry import treatments, used_in

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

SHARING, PLAN = Path("figures") / "sharing.png", Path("figures") / "plan.png"
"""The figure in a converted model's folder, of a plan that shares and does nothing else, and of any other one."""

BAND = 40
"""Layers side by side; deeper stacks go on below."""

# Pixels, about two for each that a page shows: a cell's side, the room left of the cells, a line of text, the margin,
# a legend entry, and the least width.
CELL, LEFT, LINE, MARGIN, ENTRY, WIDTH = 40, 112, 30, 12, 440, 900

# Heights of text: the title, other text and one number in a cell, two numbers in a cell.
TITLE, TEXT, SMALL = 26, 21, 17

OWN = Look("own", "#e8e8e8", "own attention")
"""Of KV groups to which nothing is done."""


@dataclass(frozen=True)
class Cell:
    """One KV group of one layer, and its looks: several if several treatments are done to it."""

    layer: int
    group: int
    looks: tuple[Look, ...]

    @property
    def state(self) -> str:
        return "+".join(look.state for look in self.looks)

    @property
    def label(self) -> str:
        """In one or two lines: that of the only look that has one, or one of each."""
        labels = [look.label for look in self.looks if look.label]
        return labels[0] if len(labels) == 1 else "\n".join(label.partition("\n")[0] for label in labels[:2])


def file_for(treatments: Iterable[str]) -> Path:
    """Where the figure of a plan of these treatments is, in the folder of a converted model."""
    return SHARING if set(treatments) <= {"share"} else PLAN


def cells(drawings: Sequence[Drawing], geometry: ModelGeometry) -> tuple[Cell, ...]:
    """Every KV group of the model, layer by layer."""
    cells = []
    for index, layer in enumerate(geometry.layers):
        for group in range(layer.groups):
            looks = [drawing.looks[index, group] for drawing in drawings if (index, group) in drawing.looks]
            cells.append(Cell(index, group, tuple(looks) or (OWN,)))
    return tuple(cells)


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


def plan_figure(plan: Plan, geometry: ModelGeometry, path: Path) -> Path:
    """Draw layers (x) by KV groups (y) into `path`, which ends in .png; its folder is made if need be.

    Each stack of an encoder-decoder has a band of its own; layers without softmax attention are blank. Equal plans give
    equal bytes with one build of Pillow.
    """
    from PIL import Image, ImageDraw

    path.parent.mkdir(parents=True, exist_ok=True)
    drawings = drawings_of(plan, geometry)
    grid = cells(drawings, geometry)
    blank = any(not layer.heads for layer in geometry.layers)
    legend = _legend_of(drawings, grid)
    bands = _bands(
        geometry, MARGIN + LINE * (1 + len(drawings) + len(_notes(drawings)) + blank + (len(legend) + 1) // 2)
    )
    columns = max(len(band.layers) for band in bands)
    height = bands[-1].top + bands[-1].groups * CELL + LINE + MARGIN
    image = Image.new("RGB", (max(WIDTH, LEFT + columns * CELL + MARGIN), height), "white")
    canvas = ImageDraw.Draw(image)
    _legend(canvas, drawings, legend, blank)
    for band in bands:
        _axes(canvas, band)
    tiles: dict[tuple[Look, ...], Image.Image] = {}
    for cell in grid:
        if cell.looks not in tiles:
            tiles[cell.looks] = _tile(cell)
        band = next(band for band in bands if cell.layer in band.layers)
        column = band.layers.index(cell.layer)
        image.paste(tiles[cell.looks], (LEFT + column * CELL + 1, band.top + cell.group * CELL + 1))
    image.save(path)
    return path


def drawings_of(plan: Plan, geometry: ModelGeometry) -> tuple[Drawing, ...]:
    """What each treatment that the plan uses draws; of a plan that does nothing, what the first one would."""
    drawings = [treatment.drawing(plan, geometry) for treatment in used_in(plan) or treatments()[:1]]
    return tuple(drawing for drawing in drawings if drawing is not None)


def _tile(cell: Cell) -> "Image":
    """A square; with several looks, in stripes side by side."""
    from PIL import Image, ImageDraw

    side = CELL - 2
    tile = Image.new("RGB", (side, side), cell.looks[0].colour)
    canvas = ImageDraw.Draw(tile)
    for at, look in enumerate(cell.looks):
        left, right = side * at // len(cell.looks), side * (at + 1) // len(cell.looks) - 1
        canvas.rectangle((left, 0, right, side), look.colour)
        _mark(canvas, look, (left, 0, right, side - 1))
    _number(canvas, cell)
    return tile


def _mark(canvas: "ImageDraw", look: Look, box: tuple[int, int, int, int]) -> None:
    """What tells a look from others in grey. box: left, top, right and bottom."""
    left, top, right, bottom = box
    gap = 4
    if look.mark == "edges":  # with room for three digits between them
        for x in (left + 1, right - 2):
            canvas.rectangle((x, top + gap, x + 1, bottom - gap), look.ink)
    elif look.mark == "floor":
        canvas.rectangle((left + gap, bottom - gap - 2, right - gap, bottom - gap), look.ink)
    elif look.mark == "roof":
        canvas.rectangle((left + gap, top + gap, right - gap, top + gap + 2), look.ink)
    if look.mark in ("diagonal", "cross"):
        canvas.line((left + gap, bottom - gap, right - gap, top + gap), look.ink, 2)
    if look.mark == "cross":
        canvas.line((left + gap, top + gap, right - gap, bottom - gap), look.ink, 2)


def _notes(drawings: Sequence[Drawing]) -> list[str]:
    return [drawing.note for drawing in drawings if drawing.note]


def _legend_of(drawings: Sequence[Drawing], grid: Sequence[Cell]) -> list[Look]:
    """The looks that occur, each once, in their order."""
    seen = {look.state: look for cell in grid for look in cell.looks}
    order = [OWN.state, *(state for drawing in drawings for state in drawing.legend)]
    return [seen[state] for state in dict.fromkeys(order) if state in seen]


def _text(canvas: "ImageDraw", place: tuple[float, float], text: str, anchor: str, size: int, ink: str) -> None:
    """anchor: where in the text the place is, in Pillow's letters."""
    canvas.text(place, text, ink, _font(size), anchor, spacing=2, align="center")


@cache
def _font(size: int) -> "FreeTypeFont":
    """The scalable font that Pillow brings. Raises ImportError if Pillow was built without FreeType."""
    from PIL import ImageFont

    return cast("FreeTypeFont", ImageFont.load_default(size))


def _legend(canvas: "ImageDraw", drawings: Sequence[Drawing], looks: Sequence[Look], blank: bool) -> None:
    """Titles, meaning of the labels, and of the colours that occur. blank: whether some layers are."""
    lines = [(drawing.title, TITLE) for drawing in drawings] + [(note, TEXT) for note in _notes(drawings)]
    lines += [("Blank: layer without softmax attention", TEXT)] if blank else []
    for number, (text, size) in enumerate(lines):
        _text(canvas, (MARGIN, MARGIN + LINE * (number + 0.5)), text, "lm", size, "black")
    for index, look in enumerate(looks):
        row, column = divmod(index, 2)
        x, y = MARGIN + column * ENTRY, MARGIN + LINE * (len(lines) + row)
        box = x, y + 5, x + CELL - 1, y + LINE - 6
        canvas.rectangle(box, look.colour)
        _mark(canvas, look, box)
        _text(canvas, (x + CELL + 8, y + LINE / 2), look.meaning, "lm", TEXT, "black")


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
    size = SMALL if len(cell.label) > 2 else size
    _text(canvas, (CELL / 2 - 1, y), cell.label, "mm", size, cell.looks[0].ink)
