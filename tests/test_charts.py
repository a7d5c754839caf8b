"""Charts of an analysis: for small and deep models, for whole layers, and for both measures of costs."""

import random
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from sa_convert.data.analysis import Analysis, AttentionStatistics, CalibrationText, CurvePoint, UnitCost
from sa_convert.data.geometry import LayerGeometry, ModelGeometry
from sa_convert.data.report import BaseModel
from sa_convert.data.sharing_map import SharingMap
from sa_convert.data.units import Units
from sa_convert.publish.charts import CHARTS, write_charts


def make_analysis(
    layers, heads, groups, measure="fisher", granularity="head", cost=lambda chance: 10 ** chance(-6, -1)
):
    chance = random.Random(0).uniform
    units = Units(ModelGeometry((LayerGeometry(heads, groups, 64),) * layers, granularity))
    matrix = tuple(tuple(1.0 if row == column else chance(0, 1) for column in range(layers)) for row in range(layers))
    costs = [
        UnitCost(unit, cost(chance), tuple((unit.layer - 1, head) for head in unit.heads))
        if unit.layer
        else UnitCost(unit, None, None)
        for unit in units.all
    ]
    sharing = units.to_map({found.unit: found.sources for found in costs if found.unit.layer == layers - 1})
    points = tuple(CurvePoint(part / 10, part, part**2 / 100, part**2 / 90, part**2 / 95, None) for part in range(1, 6))
    by_layer = tuple(chance(0, 1) for _ in range(layers))
    return Analysis(
        BaseModel("org/model"), "llama", CalibrationText("builtin", 8, 128, 0), "float32", measure, (heads,) * layers,
        AttentionStatistics(matrix, matrix, by_layer, by_layer, 6), tuple(costs), points, sharing, 1 / layers, 10**9,
    )  # fmt: skip


@pytest.mark.parametrize(
    "analysis",
    [
        pytest.param(make_analysis(2, 2, 1), id="smallest"),
        pytest.param(make_analysis(6, 8, 4, "output error"), id="small"),
        pytest.param(make_analysis(80, 64, 8), id="deep"),
        pytest.param(make_analysis(24, 16, 4, granularity="layer"), id="whole layers"),
        pytest.param(make_analysis(6, 8, 4, cost=lambda _: 0.0), id="free"),
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
    partial = SharingMap({2: (None, (1, 0), None, (0, 3))})
    assert Analysis(**{**vars(analysis), "sharing": partial}).used_sources == {(2, 1): 1, (2, 0): 1}


def test_charts_leave_pyplot_alone():
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import sa_convert.publish.charts, sa_convert.commands.analyze\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from test_charts import make_analysis\n"
        "for draw in sa_convert.publish.charts.CHARTS.values(): draw(make_analysis(3, 2, 1))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
