"""Chart of where attention comes from: layers that borrow by source layers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sa_convert.domain.analysis import Analysis
from sa_convert.present.charts.chart_layers import layer_axis, shown_layers, shown_stacks
from sa_convert.present.charts.chart_parts import numbers, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

NOT_EARLIER = "#f2f2f2"
"""Behind layers that can be no source."""

NUMBERED = 16
"""Layers up to which cells hold their numbers."""


def source_chart(analysis: Analysis) -> "Figure":
    """How many heads of a layer have their source in which layer: the best of each head, and in the recipe's map."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    figure = paper(f"{analysis.base_model.id}: from which layer attention would come", 10.5, 5.4)
    panels = figure.subplots(1, 2)
    counted = (
        ("best source of each head", analysis.best_sources),
        (f"recipe.yaml ({analysis.key_cache_removed:.1%} of the {analysis.keys_name} removed)", analysis.used_sources),
    )
    # Without the light end, which would be lost on white.
    shades = matplotlib.colormaps["viridis_r"]([0.15 + 0.85 * step / 255 for step in range(256)])
    colours = LinearSegmentedColormap.from_list("counts", shades)
    # Not linear: most cells hold few heads, and some of the first layers hold all.
    top = max(2, *(count for _, counts in counted for count in counts.values()))
    scale = PowerNorm(0.5, 1, top)
    for axes, (title, counts) in zip(panels, counted, strict=True):
        image = _counts(axes, counts, analysis, colours, scale)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="layer that borrows", ylabel="source layer")
    ticks = [2**power for power in range(top.bit_length())]
    figure.colorbar(image, ax=list(panels), label="heads of the layer", shrink=0.85, ticks=ticks).ax.minorticks_off()
    return figure


def _counts(
    axes: "Axes", counts: Mapping[tuple[int, int], int], analysis: Analysis, colours: Any, scale: "Normalize"
) -> Any:
    import numpy

    layers = shown_layers(analysis)
    places = {(layers.index(layer), layers.index(source)): count for (layer, source), count in counts.items()}
    grid = numpy.full((len(layers), len(layers)), numpy.nan)
    for (layer, source), count in places.items():
        grid[source, layer] = count
    image = axes.imshow(grid, cmap=colours, norm=scale, origin="lower", interpolation="nearest")
    axes.set_facecolor(NOT_EARLIER)
    for _, members in shown_stacks(analysis):
        first, last = members[0] - 0.5, members[-1] + 0.5
        axes.fill([first, last, last], [first, first, last], facecolor="white", edgecolor="#c8c8c8", zorder=-1)
    elsewhere = "not earlier, or of another stack" if analysis.stacks else "not earlier"
    box = {"facecolor": NOT_EARLIER, "edgecolor": "none", "pad": 1}
    axes.text(0.04, 0.96, elsewhere, transform=axes.transAxes, va="top", fontsize=9, color="#666666", bbox=box)
    if len(layers) <= NUMBERED:
        numbers(axes, places, lambda count: colours(scale(count)))
    layer_axis(axes.xaxis, analysis)
    layer_axis(axes.yaxis, analysis)
    return image
