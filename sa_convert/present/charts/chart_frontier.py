"""The chart of a frontier: loss, and copying, against bytes of the cache, a line for each set of treatments."""

from typing import TYPE_CHECKING

from sa_convert.console.amounts import human_bytes
from sa_convert.domain.frontier import Frontier
from sa_convert.present.charts.chart_parts import BLUE, GREEN, GREY, ORANGE, paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), ("#cc79a7", "D", ":"), ("black", "v", "-"))
"""Colour, marker and stroke of each line: no two share any of the first four."""


def frontier_chart(frontier: Frontier, name: str) -> "Figure":
    """name: of the model."""
    import numpy

    before = frontier.points[0].cache.before if frontier.points else 0
    figure = paper(f"{name}: what a smaller cache costs, at {frontier.at:,} tokens ({human_bytes(before)})", 9, 7)
    above, below = figure.subplots(2, 1, sharex=True)
    for number, (treatments, points) in enumerate(frontier.lines().items()):
        colour, marker, stroke = STYLES[number % len(STYLES)]
        saved = [100 * point.cache.removed for point in points]
        line = {"color": colour, "marker": marker, "linestyle": stroke, "label": " + ".join(treatments)}
        above.errorbar(saved, [p.loss for p in points], yerr=[p.error for p in points], capsize=2, **line)
        copying = [(at, worst[1]) for at, p in zip(saved, points, strict=True) if (worst := p.worst_copying)]
        if copying:
            below.plot(*zip(*copying, strict=True), **line)
    percent = (lambda loss: 100 * numpy.expm1(loss), lambda rise: numpy.log1p(numpy.maximum(rise, -99) / 100))
    above.secondary_yaxis("right", functions=percent).set_ylabel("rise of the perplexity, %")
    above.set(ylabel="rise of the loss on held-out text,\nnats a token")
    below.set(ylabel="rise of the loss on copied tokens,\nworst distance, nats a token", xlabel="cache saved, %")
    for axes in (above, below):
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.grid(alpha=0.3)
    above.legend(fontsize=9, loc="upper left")
    below.set_xlim(left=0)
    return figure
