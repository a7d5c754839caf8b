"""Charts of what sharing costs: by KV group, and by key cache removed."""

from collections import Counter
from typing import TYPE_CHECKING

from sa_convert.domain.analysis import Analysis
from sa_convert.present.charts.chart_layers import layer_axis, shown_layers
from sa_convert.present.charts.chart_parts import BLUE, GREEN, GREY, NOTHING, ORANGE, array, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

DECADES = 4
"""How far colours reach down from the highest cost; what costs less looks alike."""


def cost_chart(analysis: Analysis) -> "Figure":
    """The cost of each KV group, layers by groups, on a logarithmic scale; marked: what the recipe removes."""
    import matplotlib
    import numpy
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    rows = [analysis.cost_matrix[layer] for layer in shown_layers(analysis)]
    costs = array(tuple(rows)).T  # (G, L)
    groups = len(costs)
    whole = any(len(cost.unit.groups) > 1 for cost in analysis.costs)
    what = "layer" if whole else "KV group"
    height = min(8.0, 2.4 + 0.25 * max(groups, 3))
    figure = paper(f"{analysis.base_model.id}: cost of each {what} if it alone gave up its attention", 10, height)
    axes = figure.subplots()
    scale = scale_of([cost.cost for cost in analysis.costs if cost.cost is not None])
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=NOTHING)
    shown = numpy.maximum(costs, float(scale.vmin or 0))  # NaN stays
    image = axes.imshow(shown, cmap=colours, norm=scale, origin="lower", aspect="auto", interpolation="nearest")
    # Blank: groups that a layer does not have.
    blank = [[1.0 if group >= len(row) else numpy.nan for row in rows] for group in range(groups)]
    axes.imshow(blank, cmap=ListedColormap(["white"]), origin="lower", aspect="auto", interpolation="nearest")
    label = f"cost, {analysis.cost_unit}"
    figure.colorbar(image, ax=axes, label=label, extend="min" if (costs < scale.vmin).any() else "neither")
    _mark_removed(axes, analysis, groups)
    axes.scatter([], [], s=60, marker="s", color=NOTHING, label="no earlier layer from which it could borrow")
    axes.set(xlabel="layer", ylabel="" if whole else "KV group", ylim=(-0.5, groups - 0.5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=min(groups, 10), integer=True))
    if whole:
        axes.set_yticks([])
    layer_axis(axes.xaxis, analysis)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def scale_of(costs: list[float]) -> "LogNorm":
    """A logarithmic scale of DECADES below the highest cost."""
    from matplotlib.colors import LogNorm

    positive = [cost for cost in costs if cost > 0] or [1.0]
    top = max(positive)
    low = max(min(positive), top / 10**DECADES)
    return LogNorm(low if low < top else top / 10, top)


def _mark_removed(axes: "Axes", analysis: Analysis, groups: int) -> None:
    """A dot on each unit that the recipe treats."""
    layers = shown_layers(analysis)
    columns: Counter[int] = Counter()
    removed: list[tuple[int, int]] = []
    for unit in (cost.unit for cost in analysis.costs):
        planned = analysis.plan.layers.get(unit.layer, {})
        if isinstance(planned, str) or all(group in planned for group in unit.groups):
            removed.append((layers.index(unit.layer), columns[unit.layer]))
        columns[unit.layer] += 1
    size = max(9.0, min(60.0, 3600 / (len(layers) * max(1.0, groups / 8))))
    label = f"borrows in recipe.yaml ({analysis.key_cache_removed:.1%} of the {analysis.keys_name})"
    x, y = [place[0] for place in removed], [place[1] for place in removed]
    axes.scatter(x, y, s=size, color="white", edgecolors="black", linewidths=0.8, label=label)


def loss_chart(analysis: Analysis) -> "Figure":
    """Against key cache removed: rise of the loss and divergence, measured on held-out text, and estimated by costs.

    Estimates that are not in nats have a panel of their own.
    """
    import numpy

    same_unit = analysis.measure == "fisher"
    title = f"{analysis.base_model.id}: loss against {analysis.keys_name} removed, without refit"
    figure = paper(title, 9, 5 if same_unit else 7)
    panels = figure.subplots(1 if same_unit else 2, 1, sharex=True, squeeze=False)[:, 0]
    above, below = panels[0], panels[-1]
    removed = [100 * point.key_cache_removed for point in analysis.curve]
    losses = [point.measured_loss for point in analysis.curve]
    divergences = [point.measured_divergence for point in analysis.curve]
    estimates = [point.estimated_loss for point in analysis.curve]
    above.plot(removed, losses, "o-", color=BLUE, label="rise of the loss, measured on held-out text")
    above.plot(removed, divergences, "^-.", color=GREEN, label="divergence from the base model, measured there")
    above.set(ylabel="nats per token")
    percent = (lambda loss: 100 * numpy.expm1(loss), lambda rise: numpy.log1p(numpy.maximum(rise, -99) / 100))
    above.secondary_yaxis("right", functions=percent).set_ylabel("rise of the perplexity, %")
    label = "divergence, estimated by costs" if same_unit else "sum of costs"
    below.plot(removed, estimates, "s--", color=ORANGE, label=label)
    below.set(xlabel=f"{analysis.keys_name} removed, %")
    if not same_unit:
        below.set(ylabel=analysis.cost_unit)
    for axes in panels:
        axes.axvline(100 * analysis.key_cache_removed, color=GREY, linestyle=":", label="recipe.yaml")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper left")
    below.set_xlim(left=0)
    return figure
