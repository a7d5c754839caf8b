"""Charts of an analysis: for small and deep models, for whole layers, and for both measures of costs."""

import io
import random
import re
import subprocess
import sys
from collections import Counter

import numpy
import pytest
from PIL import Image

from sa_convert.domain.analysis import Analysis, AttentionStatistics, CalibrationText, CurvePoint, UnitCost
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.report import BaseModel
from sa_convert.domain.units import Units
from sa_convert.present.charts.all_charts import CHARTS, write_charts
from sa_convert.present.terminal.analysis_text import render_analysis
from sa_convert.treatments.share.plans import plan_of, plan_of_unit
from sa_convert.treatments.share.rules import layer_difference
from sa_convert.treatments.share.sharing_map import SharingMap
from sa_convert.treatments.share.treatment import ShareTreatment
from support.processes import ROOT


def make_analysis(
    layers, heads, groups, measure="fisher", granularity="head", cost=lambda chance: 10 ** chance(-6, -1)
):
    return analysis_of(ModelGeometry((LayerGeometry(heads, groups, 64),) * layers, granularity), measure, cost)


def encoder_decoder(encoder, decoder, heads=16):
    """Stacks of these depths; decoders have fewer heads than encoders."""
    found = [LayerGeometry(heads, heads, 64, stack="encoder", cached=False)] * encoder
    for name in ("decoder", "decoder.cross"):
        found += [LayerGeometry(heads // 2, heads // 2, 64, stack=name)] * decoder
    return ModelGeometry(tuple(found))


def mixed(depth, period):
    """Every period-th layer has softmax attention."""
    none, full = LayerGeometry(0, 0, 0, "none"), LayerGeometry(16, 2, 64)
    return ModelGeometry(tuple(none if (layer + 1) % period else full for layer in range(depth)))


def analysis_of(geometry, measure="fisher", cost=lambda chance: 10 ** chance(-6, -1)):
    chance = random.Random(0).uniform
    units = Units(geometry)
    layers = len(geometry.layers)

    def compared(row, column):
        return layer_difference(geometry.layers[row], geometry.layers[column]) is None

    matrix = tuple(
        tuple((1.0 if row == column else chance(0, 1)) if compared(row, column) else None for column in range(layers))
        for row in range(layers)
    )
    costs = []
    for unit in units.all:
        source = next((layer for layer in reversed(range(unit.layer)) if compared(layer, unit.layer)), None)
        found = None if source is None else tuple((source, head) for head in unit.heads)
        costs.append(UnitCost(unit, None if found is None else cost(chance), found))
    plan = Plan(
        {
            layers - 1: {
                group: told
                for found in costs
                if found.unit.layer == layers - 1
                for group, told in plan_of_unit(found.unit, found.sources, geometry).items()
            }
        },
        geometry.stacks,
    )
    share = ShareTreatment()
    layers_told = share.layers_in_recipe(plan, geometry)
    used = Counter((layer, source) for layer, (source, _) in share.lenders(plan, geometry))
    points = tuple(CurvePoint(part / 10, part, part**2 / 100, part**2 / 90, part**2 / 95, None) for part in range(1, 6))
    by_layer = tuple(chance(0, 1) if layer.heads else None for layer in geometry.layers)
    heads = tuple(layer.heads for layer in geometry.layers)
    return Analysis(
        BaseModel("org/model"), "llama", CalibrationText("builtin", 8, 128, 0), "float32", measure, heads,
        AttentionStatistics(matrix, matrix, by_layer, by_layer, 6), tuple(costs), points, plan,
        layers_told, used, 1 / layers, 10**9,
    )  # fmt: skip


@pytest.mark.parametrize(
    "analysis",
    [
        pytest.param(make_analysis(2, 2, 1), id="smallest"),
        pytest.param(make_analysis(6, 8, 4, "output error"), id="small"),
        pytest.param(make_analysis(80, 64, 8), id="deep"),
        pytest.param(make_analysis(24, 16, 4, granularity="layer"), id="whole layers"),
        pytest.param(make_analysis(6, 8, 4, cost=lambda _: 0.0), id="free"),
        pytest.param(analysis_of(encoder_decoder(6, 4)), id="stacks"),
        pytest.param(analysis_of(encoder_decoder(12, 2)), id="narrow stacks"),
        pytest.param(analysis_of(mixed(48, 4)), id="mixed"),
    ],
)
def test_every_chart_is_drawn(analysis, tmp_path):
    written = write_charts(analysis, tmp_path / "figures")
    assert [path.name for path in written] == list(CHARTS)
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_equal_analyses_give_equal_files_whatever_the_users_style(tmp_path):
    analysis = make_analysis(6, 8, 4)
    first = {path.name: path.read_bytes() for path in write_charts(analysis, tmp_path / "a")}
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        second = {path.name: path.read_bytes() for path in write_charts(analysis, tmp_path / "b")}
    assert first == second


def test_what_a_layer_reuses_is_counted():
    analysis = make_analysis(4, 4, 2)
    assert analysis.best_sources == {(1, 0): 4, (2, 1): 4, (3, 2): 4}
    assert analysis.used_sources == {(3, 2): 4}
    assert analysis.cost_matrix[0] == (None, None)
    model = ModelGeometry((LayerGeometry(4, 2, 64),) * 4)
    partial = plan_of(SharingMap({2: (None, (1, 0), None, (0, 3))}), model)
    assert list(ShareTreatment().lenders(partial, model)) == [(2, (1, 0)), (2, (0, 3))]


def drawn(chart, analysis):
    """The axes of a chart, as it would be saved."""
    figure = CHARTS[chart](analysis)
    figure.savefig(io.BytesIO())
    return figure.axes


def ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return {place: label.get_text() for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            if low <= place <= high}  # fmt: skip


def test_axes_number_the_layers_of_each_stack_and_name_it():
    for chart in ("similarity.png", "sources.png"):
        for axes in drawn(chart, analysis_of(encoder_decoder(6, 4)))[:2]:
            numbers = [*"012345", *"0123", *"0123"]
            for axis in (axes.xaxis, axes.yaxis):
                assert ticks(axis) == dict(enumerate(numbers))
            names = [text.get_text() for text in axes.texts]
            assert [names.count(name) for name in ("encoder", "decoder", "decoder.cross")] == [2, 2, 2]
            assert {line.get_xdata()[0] for line in axes.lines} >= {5.5, 9.5}


def test_names_of_stacks_do_not_overlap():
    for depths in ((6, 4), (12, 2), (24, 24), (12, 3)):
        figure = CHARTS["similarity.png"](analysis_of(encoder_decoder(*depths)))
        figure.savefig(io.BytesIO())
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        labels = [axis.label.get_window_extent() for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in (*boxes[number + 1 :], *labels)), depths


def test_charts_show_layers_with_softmax_attention_only():
    analysis = analysis_of(mixed(12, 3))
    for chart in CHARTS:
        if chart != "loss.png":
            axes = drawn(chart, analysis)[1 if chart == "isotropy.png" else 0]
            assert ticks(axes.xaxis) == {0: "2", 1: "5", 2: "8", 3: "11"}
    similarity = drawn("similarity.png", analysis)[0].images[0].get_array()
    assert similarity.shape == (4, 4)
    assert similarity[1, 2] == analysis.attention.similarity[5][8]
    variance = drawn("isotropy.png", analysis)[1].lines[0]
    assert list(variance.get_xdata()) == [0, 1, 2, 3]
    assert list(variance.get_ydata()) == [value for value in analysis.attention.variance if value is not None]


def test_layers_that_are_not_compared_are_blank():
    analysis = analysis_of(encoder_decoder(3, 2))
    matrix = drawn("similarity.png", analysis)[0].images[0].get_array()
    stack = [0, 0, 0, 1, 1, 2, 2]
    blank = [[row != column for column in stack] for row in stack]
    assert numpy.ma.getmaskarray(matrix).tolist() == blank
    # Lines of isotropy and variance end with the stack.
    lines = [list(line.get_xdata()) for line in drawn("isotropy.png", analysis)[1].lines[:3]]
    assert lines == [[0, 1, 2], [3, 4], [5, 6]]


def test_json_of_stacks_has_labels_and_numbers_in_each():
    content = analysis_of(encoder_decoder(3, 2)).to_json()
    names = ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1", "decoder.cross.0", "decoder.cross.1"]
    assert content["layers"] == names
    last = content["units"][-1]
    assert (last["stack"], last["layer"], last["sources"]) == ("decoder.cross", 1, [[0, 7]])
    assert list(content["recipe"]["layers"]) == ["decoder.cross.1"]
    plain = make_analysis(3, 2, 1).to_json()
    assert plain["layers"] == ["0", "1", "2"]
    assert "stack" not in plain["units"][0]


def test_terminal_names_layers_and_what_is_removed():
    text = render_analysis(analysis_of(encoder_decoder(3, 2)))
    assert "heads of layer decoder.cross.1 borrow" in text
    assert "Key cache removed" in text
    assert re.search(r"layer encoder\.\d group \d+: .*, sources \(layer.head\) [01]\.\d", text)
    encoder = Analysis(**{**vars(make_analysis(3, 2, 1)), "caches": False})
    assert "Keys removed" in render_analysis(encoder)
    assert "of the keys; heads of layer 2 borrow" in render_analysis(encoder)
    assert drawn("loss.png", encoder)[0].get_xlabel() == "keys removed, %"


def test_charts_leave_pyplot_alone():
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/publishing']\n"
        "import sa_convert.present.charts.all_charts, sa_convert.commands.analyze\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from test_charts import make_analysis\n"
        "for draw in sa_convert.present.charts.all_charts.CHARTS.values(): draw(make_analysis(3, 2, 1))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
