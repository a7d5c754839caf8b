"""The figure of a healing: loss on held-out text and on held-out copying, by tokens that were trained on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sa_convert.domain.healed import HealReport
from sa_convert.present.charts.chart_parts import BLUE, GREY, ORANGE, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "figures/healing.png"
_LIGHT = 0.45


def heal_chart(report: HealReport) -> "Figure":
    """Left: held-out text, right: copying, as nats above the base; a line each kind or distance, and the mean."""
    figure = paper(f"Healing on {report.tokens:,} tokens of {report.text}", 9.0, 3.6)
    left, right = figure.subplots(1, 2)
    apart = {kind: [one.divergence[kind] for one in report.curve] for kind in report.base.text}
    _lines(left, report, apart, dict.fromkeys(apart, 0.0))
    named = {str(distance): loss for distance, loss in report.base.copying.items()}
    _lines(right, report, {key: [one.copying[int(key)] for one in report.curve] for key in named}, named)
    left.set_title("divergence on held-out text", fontsize=10)
    right.set_title("loss of copying over so many tokens, above the base's", fontsize=10)
    left.set_ylabel("nats a token")
    return figure


def _lines(axes: "Axes", report: HealReport, losses: dict[str, list[float]], base: Mapping[str, float]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    tokens = [judged.tokens for judged in report.curve]
    rises = {name: [loss - base[name] for loss in row] for name, row in losses.items()}
    for number, (name, row) in enumerate(rises.items()):
        marker = "osD^vPX*"[number % 8]
        axes.plot(tokens, row, marker=marker, markersize=3, color=GREY, alpha=_LIGHT, linewidth=1)
        axes.annotate(name, (tokens[-1], row[-1]), textcoords="offset points", xytext=(4, -3), fontsize=7, color=GREY)
    mean = [sum(column) / len(column) for column in zip(*rises.values(), strict=True)]
    axes.plot(tokens, mean, "o-", color=BLUE, linewidth=2, markersize=4, label="mean")
    if report.kept is not None:
        axes.plot(tokens[report.kept], mean[report.kept], "s", color=ORANGE, markersize=8, label="kept")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
