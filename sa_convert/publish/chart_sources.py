"""Chart of where attention comes from: reusing layers by source layers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sa_convert.data.analysis import Analysis
from sa_convert.publish.chart_parts import layer_axis, numbers, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

NUMBERED = 16
"""Layers up to which cells hold their numbers."""


def source_chart(analysis: Analysis) -> "Figure":
    """How many heads of a layer have their source in which layer: the best of each head, and in the recipe's map."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    layers = len(analysis.heads)
    figure = paper(f"{analysis.base_model.id}: from which layer attention would come", 10.5, 5.4)
    panels = figure.subplots(1, 2)
    counted = (
        ("best source of each head", analysis.best_sources),
        (f"recipe.yaml ({analysis.key_cache_removed:.1%} of the key cache removed)", analysis.used_sources),
    )
    # Without the light end, which would be lost on white.
    shades = matplotlib.colormaps["viridis_r"]([0.15 + 0.85 * step / 255 for step in range(256)])
    colours = LinearSegmentedColormap.from_list("counts", shades)
    # Not linear: most cells hold few heads, and some of the first layers hold all.
    top = max(2, *(count for _, counts in counted for count in counts.values()))
    scale = PowerNorm(0.5, 1, top)
    for axes, (title, counts) in zip(panels, counted, strict=True):
        image = _counts(axes, counts, layers, colours, scale)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="layer that reuses", ylabel="source layer")
    ticks = [2**power for power in range(top.bit_length())]
    figure.colorbar(image, ax=list(panels), label="heads of the layer", shrink=0.85, ticks=ticks).ax.minorticks_off()
    return figure


def _counts(axes: "Axes", counts: Mapping[tuple[int, int], int], layers: int, colours: Any, scale: "Normalize") -> Any:
    import numpy

    grid = numpy.full((layers, layers), numpy.nan)
    for (layer, source), count in counts.items():
        grid[source, layer] = count
    image = axes.imshow(grid, cmap=colours, norm=scale, origin="lower", interpolation="nearest")
    corner = layers - 0.5
    axes.fill([-0.5, corner, -0.5], [-0.5, corner, corner], facecolor="#f2f2f2", edgecolor="#c8c8c8", zorder=0)
    axes.text(0.04, 0.96, "not earlier", transform=axes.transAxes, va="top", fontsize=9, color="#666666")
    if layers <= NUMBERED:
        numbers(axes, dict(counts), lambda count: colours(scale(count)))
    layer_axis(axes.xaxis, layers)
    layer_axis(axes.yaxis, layers)
    return image
