"""The figure of a plan of several treatments, and what windows say of themselves."""

from dataclasses import replace
from itertools import combinations

import pytest
from PIL import Image, ImageColor

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.treated import Drawing, Look
from sa_convert.present.charts import plan_figure as figure
from sa_convert.present.files.card import write_card
from sa_convert.treatments.drop.treatment import DropTreatment
from sa_convert.treatments.linear.treatment import LinearTreatment
from sa_convert.treatments.low_rank import drawing as low_rank
from sa_convert.treatments.merge import drawing as merge
from sa_convert.treatments.registry import used_in
from sa_convert.treatments.share.drawing import LOOKS
from sa_convert.treatments.window import drawing as windows
from support.measured_report import MEASURED

MODEL = ModelGeometry((LayerGeometry(6, 3, 8),) * 8)
PLAN = Plan(
    {
        1: {0: {"window": {"sinks": 4, "tokens": 64}}, 2: {"window": {"sinks": 4, "tokens": 1536}}},
        2: {1: {"window": {"sinks": 0, "tokens": 256}}},
        3: {0: {"share": [[0, 0], [0, 1]]}, 1: {"window": {"sinks": 4, "tokens": 64}}},
        4: "drop",
        6: "linear",
        7: {group: {"merge": {"groups": 1}} for group in range(3)},
    }
)


def cells(plan):
    return {(cell.layer, cell.group): cell for cell in figure.cells(figure.drawings_of(plan, MODEL), MODEL)}


def test_every_kv_group_shows_what_is_done_to_it():
    found = cells(PLAN)
    states = {place: cell.state for place, cell in found.items() if cell.state != "own"}
    assert states == {
        **dict.fromkeys([(1, 0), (1, 2), (2, 1), (3, 1)], "window"),
        (0, 0): "source",
        (3, 0): "borrowed",
        **{(4, group): "drop" for group in range(3)},
        **{(6, group): "linear" for group in range(3)},
        **{(7, group): "merge" for group in range(3)},
    }
    labels = {place: cell.label for place, cell in found.items() if cell.label}
    assert labels == {
        (1, 0): "64",
        (1, 2): "1.5k",
        (2, 1): "256",
        (3, 1): "64",
        (3, 0): "0",
        **dict.fromkeys([(7, group) for group in range(3)], "1/3"),
    }


@pytest.mark.parametrize(
    ("used", "states"),
    [
        (("window",), ["own", "window"]),
        (("window", "drop"), ["own", "window", "drop"]),
        (("window", "share", "linear", "drop"), ["own", "window", "source", "borrowed", "linear", "drop"]),
        (("merge", "drop"), ["own", "merge", "drop"]),
    ],
)
def test_the_legend_has_what_occurs_and_nothing_else(used, states):
    drawings = figure.drawings_of(PLAN.only(*used), MODEL)
    legend = figure._legend_of(drawings, figure.cells(drawings, MODEL))
    assert [look.state for look in legend] == states


def test_the_colours_are_in_the_file(tmp_path):
    path = figure.plan_figure(PLAN, MODEL, tmp_path / "figures" / "plan.png")
    with Image.open(path) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20)}
    for cell in cells(PLAN).values():
        for look in cell.looks:
            assert colours[ImageColor.getrgb(look.colour)] > 500
    assert path.read_bytes() == figure.plan_figure(PLAN, MODEL, tmp_path / "again.png").read_bytes()


def test_a_cell_with_two_treatments_shows_both(tmp_path):
    one, other = Look("one", "#102030", "one", label="7", ink="white"), Look("other", "#f0e0d0", "other", label="r8")
    cell = figure.Cell(0, 0, (one, other))
    assert cell.label == "7\nr8"
    tile = figure._tile(replace(cell, looks=(replace(one, label=""), replace(other, label=""))))
    assert tile.getpixel((2, 2)) == ImageColor.getrgb(one.colour)
    assert tile.getpixel((figure.CELL - 5, 2)) == ImageColor.getrgb(other.colour)


def all_looks():
    shades = [replace(windows.LOOK, colour=colour) for colour in (*windows.SHADES.values(), windows.LONGEST)]
    return [figure.OWN, *LOOKS.values(), *shades, low_rank.LOOK, merge.LOOK, DropTreatment.look, LinearTreatment.look]


# How people without one kind of cones see a colour (Machado et al. 2009, severity 1); and grey.
SIGHT = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
    "grey": ((0.3, 0.59, 0.11),) * 3,
}


@pytest.mark.parametrize("sight", SIGHT)
def test_looks_are_told_apart_by_every_eye(sight):
    """By colour, or by a mark, whatever colours there are."""

    def seen(look):
        colour = ImageColor.getrgb(look.colour)
        return [sum(weight * part for weight, part in zip(row, colour, strict=True)) for row in SIGHT[sight]]

    for one, other in combinations(all_looks(), 2):
        if one.mark == other.mark and one.state != other.state:
            apart = sum((a - b) ** 2 for a, b in zip(seen(one), seen(other), strict=True)) ** 0.5
            assert apart > 20, (one, other)


def test_labels_are_read_on_their_colours():
    def light(colour):
        parts = [part / 255 for part in ImageColor.getrgb(colour)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for look in all_looks():
        dark, bright = sorted([light(look.colour), light(look.ink)])
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, look  # WCAG 2, for text


def test_where_the_figure_lies_and_that_the_card_shows_it(tmp_path):
    assert figure.file_for(["share"]).as_posix() == "figures/sharing.png"
    assert figure.file_for([]).as_posix() == "figures/sharing.png"
    assert figure.file_for(["share", "window"]).as_posix() == "figures/plan.png"
    told = tuple(treatment.treated(PLAN, MODEL) for treatment in used_in(PLAN))
    figure.plan_figure(PLAN, MODEL, tmp_path / "figures" / "plan.png")
    card = write_card(replace(MEASURED, treated=told), "plan: {4: drop}\n", tmp_path).read_text()
    assert card.count("(figures/plan.png)") == 1
    for heading in ("What is windowed", "What is shared", "Layers that have no attention"):
        assert f"## {heading}\n" in card
    assert "\nBesides" not in card
    assert "Besides, 1 of 8 layers has no attention" in card


def test_windows_in_plain_words():
    told = windows.treated(PLAN, MODEL)
    assert dict(told.rows) == {
        "KV groups with windows": "4 of 24 KV groups",
        "of which see": "2 the first 4 and the last 64, 1 the last 256, 1 the first 4 and the last 1,536",
    }
    assert told.summary.startswith("4 of 24 KV groups, in 3 layers: 2 the first 4")
    assert told.table[2:] == (
        "| the first 4 and the last 64 | 2 | 1, 3 |",
        "| the last 256 | 1 | 2 |",
        "| the first 4 and the last 1,536 | 1 | 1 |",
    )
    assert "beyond 1,540 tokens" in told.remarks[0]
    several = Plan(
        {layer: {group: {"window": {"sinks": 4, "tokens": 9}} for group in range(1 + layer)} for layer in (0, 1)}
    )
    assert windows.treated(several, MODEL).table[2:] == ("| the first 4 and the last 9 | 3 | 0, 1 (2) |",)


def test_inspect_tells_windows():
    (row,) = windows.inspected(MODEL, PLAN, None).rows
    assert row[0] == "Windows"
    assert row[1].startswith("4 of 24 KV groups")
    assert windows.inspected(MODEL, None, None).rows == ()


def test_a_drawing_without_looks_draws_nothing_of_its_own():
    drawing = Drawing("t", "n", {}, ("x",))
    assert {cell.looks for cell in figure.cells([drawing], MODEL)} == {(figure.OWN,)}


def test_low_rank_keys_in_plain_words():
    plan = Plan({1: {0: {"low_rank": {"keys": 8}}, 1: {"low_rank": {"keys": 12}}}, 3: {0: {"low_rank": {"keys": 8}}}})
    told = low_rank.treated(plan, MODEL)
    assert told.summary == "3 of 24 KV groups, in 2 layers: 2 in 8 numbers, 1 in 12 numbers"
    assert told.table[2:] == ("| 8 of a key | 2 | 1, 3 |", "| 12 of a key | 1 | 1 |")
    assert low_rank.drawing(plan, MODEL).looks[1, 1].label == "r12"
    assert low_rank.inspected(MODEL, plan, None).rows == (("Low-rank keys", told.summary),)
    assert low_rank.inspected(MODEL, Plan(), None).rows == ()


def test_low_rank_values_in_plain_words():
    values = Plan({1: {0: {"low_rank": {"values": 8}}}})
    told = low_rank.treated(values, MODEL)
    assert (told.label, told.summary) == ("Low-rank values", "1 of 24 KV groups, in 1 layer: 1 in 8 numbers")
    assert not told.remarks  # they cost no time
    both = Plan({1: {0: {"low_rank": {"keys": 12, "values": 8}}, 1: {"low_rank": {"keys": 8}}}})
    told = low_rank.treated(both, MODEL)
    assert told.label == "Low-rank keys and values"
    assert told.summary == (
        "keys of 2 of 24 KV groups, in 1 layer: 1 in 8 numbers, 1 in 12 numbers; "
        "values of 1 of 24 KV groups, in 1 layer: 1 in 8 numbers"
    )
    assert low_rank.drawing(both, MODEL).looks[1, 0].label == "r12 v8"
