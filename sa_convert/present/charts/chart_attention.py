"""Charts of attention probabilities, after arXiv 2407.12866: similarity of layers, isotropy and variance."""

from typing import TYPE_CHECKING

from sa_convert.domain.analysis import Analysis
from sa_convert.present.charts.chart_layers import layer_axis, plot_layers, separate_stacks, shown_layers
from sa_convert.present.charts.chart_parts import BLUE, ORANGE, array, paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def similarity_chart(analysis: Analysis) -> "Figure":
    """Cosine similarity of attention probabilities, layers by layers: same head index, and best-matching head."""
    import matplotlib
    import numpy

    layers = shown_layers(analysis)
    figure = paper(f"{analysis.base_model.id}: similarity of attention probabilities between layers", 10.5, 5.2)
    left, right = figure.subplots(1, 2)
    # Blank: layers that are not compared.
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="white")
    panels = (
        (left, analysis.attention.similarity, "heads of the same index (as in the paper)", "layer", "layer"),
        (right, analysis.attention.matched, "best-matching heads", "layer in which the match is", "layer of the head"),
    )
    for axes, matrix, title, x, y in panels:
        shown = array(matrix)[numpy.ix_(layers, layers)]
        image = axes.imshow(shown, cmap=colours, vmin=0, vmax=1, origin="lower", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=x, ylabel=y)
        layer_axis(axes.xaxis, analysis)
        layer_axis(axes.yaxis, analysis)
    label = "cosine similarity, mean over heads and sequences"
    figure.colorbar(image, ax=[left, right], label=label, shrink=0.85)
    return figure


def isotropy_chart(analysis: Analysis) -> "Figure":
    """Isotropy (mean similarity to the other layers) and variance of attention probabilities, by layer."""
    import numpy

    layers = len(analysis.heads)
    matched = array(analysis.attention.matched)
    # A head can only borrow what an earlier layer computes. Layers that are not compared are NaN.
    earlier = [
        None if numpy.isnan(similar := matched[layer, :layer]).all() else float(numpy.nanmax(similar))
        for layer in range(layers)
    ]
    figure = paper(f"{analysis.base_model.id}: isotropy and variance of attention probabilities by layer", 9, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    size = 5 if len(shown_layers(analysis)) <= 40 else 3.5
    others = "the stack's other layers" if analysis.stacks else "all other layers"
    label = f"isotropy: heads of the same index, mean over {others}"
    plot_layers(above, analysis, analysis.attention.isotropy, "o-", color=BLUE, markersize=size, label=label)
    label = "best-matching heads of the best earlier layer"
    plot_layers(above, analysis, earlier, "s--", color=ORANGE, markersize=size, label=label)
    above.set(ylabel="cosine similarity", ylim=(0, 1.04))
    # Outside of the axes, where it hides no point.
    above.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    plot_layers(below, analysis, analysis.attention.variance, "o-", color=BLUE, markersize=size)
    below.set(xlabel="layer", ylabel="variance of attention probabilities")
    below.set_title(f"sequences of {analysis.calibration.length} tokens", fontsize=10)
    below.set_ylim(bottom=0)
    layer_axis(below.xaxis, analysis)
    separate_stacks(above.xaxis, analysis)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure
