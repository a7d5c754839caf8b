"""Chart of what each treatment would cost each KV group: a panel for every treatment."""

from typing import TYPE_CHECKING

from sa_convert.domain.analysis import Analysis
from sa_convert.domain.plan import plain
from sa_convert.present.charts.chart_costs import scale_of
from sa_convert.present.charts.chart_layers import layer_axis, shown_layers
from sa_convert.present.charts.chart_parts import NOTHING, array, paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def treatment_chart(analysis: Analysis) -> "Figure":
    """Layers by KV groups, one common logarithmic scale of colours; grey: no offer."""
    import matplotlib
    import numpy
    from matplotlib.ticker import MaxNLocator

    panels = _panels(analysis)
    groups = max(len(row) for rows in panels.values() for row in rows)
    height = len(panels) * min(3.0, 1.2 + 0.2 * groups) + 0.6
    figure = paper(f"{analysis.base_model.id}: cost of each treatment of each KV group alone", 10, height)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    scale = scale_of([cost for rows in panels.values() for row in rows for cost in row if cost is not None])
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=NOTHING)
    image = None
    for axes, (name, rows) in zip(grid, panels.items(), strict=True):
        shown = numpy.maximum(array(tuple(map(tuple, rows))).T, float(scale.vmin or 0))
        image = axes.imshow(shown, cmap=colours, norm=scale, origin="lower", aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=10, loc="left")
        axes.set(ylabel="KV group")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=min(groups, 6), integer=True))
        layer_axis(axes.xaxis, analysis)
    grid[-1].set(xlabel="layer")
    if image is not None:
        figure.colorbar(image, ax=list(grid), label=f"cost, {analysis.cost_unit}", extend="min")
    return figure


def _panels(analysis: Analysis) -> dict[str, list[list[float | None]]]:
    """By treatment, and by its arguments if they are the same for all KV groups: costs of shown layers by KV groups."""
    layers, found = shown_layers(analysis), dict[str, list[list[float | None]]]()
    for cost in analysis.costs:
        for treatment, arguments, value in cost.offers:
            name = treatment if isinstance(arguments, tuple) else f"{treatment}: {_told(arguments)}"
            rows = found.setdefault(name, [[] for _ in layers])
            row = rows[layers.index(cost.unit.layer)]
            row += [None] * (cost.unit.groups[0] - len(row)) + [value]
    return found


def _told(arguments: object) -> str:
    told = plain(arguments)
    if not isinstance(told, dict):
        return ""
    return ", ".join(f"{key} {value}" for key, value in told.items() if not isinstance(value, list | dict))
