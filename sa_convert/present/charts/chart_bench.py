"""The chart of a benchmark: time and memory of a model relative to another, by context, a column for each batch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sa_convert.domain.benchmark import Benchmark, Pairing, Spread
from sa_convert.present.charts.chart_parts import BLUE, GREEN, GREY, ORANGE, paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUDGE = 0.06
"""How far points of one context stand apart, in distances of contexts."""


def speed_chart(benchmark: Benchmark) -> "Figure":
    """Above, ratios of times as measured (with quartiles) and as expected; below, of cache and peak memory."""
    batches = list(dict.fromkeys(pairing.batch for pairing in benchmark.pairings))
    made = benchmark.conditions
    title = f"{benchmark.model.id}, relative to {benchmark.against.id}"
    figure = paper(f"{title}\n{made.dtype}, {made.device}, threads: {made.threads}", max(6.6, 4.4 * len(batches)), 7.2)
    grid = figure.subplots(2, len(batches), sharex=True, sharey="row", squeeze=False)
    for column, batch in enumerate(batches):
        pairings = [pairing for pairing in benchmark.pairings if pairing.batch == batch]
        above, below = grid[0][column], grid[1][column]
        above.set_title(f"batch {batch}", fontsize=10, loc="right")
        _times(above, pairings)
        _sizes(below, pairings)
        for axes in (above, below):
            axes.axhline(1, color="black", linewidth=0.8, zorder=1)
            axes.set_xticks(range(len(pairings)), [str(pairing.context) for pairing in pairings])
            axes.set_xlim(-0.4, len(pairings) - 0.6)
            axes.margins(y=0.12)
            axes.grid(alpha=0.3)
        below.set_xlabel("context, tokens")
    grid[0][0].set_ylabel("ratio of times (below 1: faster)")
    grid[1][0].set_ylabel("ratio of bytes (below 1: smaller)")
    for row in grid:
        handles, labels = row[0].get_legend_handles_labels()
        # Outside of the axes, where it hides no point.
        row[0].legend(handles, labels, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return figure


def _times(axes: "Axes", pairings: Sequence[Pairing]) -> None:
    _measured(axes, [pairing.prefill_ratio for pairing in pairings], BLUE, "o", "prefill, measured", -_NUDGE)
    _expected(axes, [pairing.expected_prefill for pairing in pairings], BLUE, "o", "prefill, by FLOPs", -_NUDGE)
    steps = [ratio for pairing in pairings if (ratio := pairing.step_ratio) is not None]
    if steps:
        _measured(axes, steps, ORANGE, "s", "decode step, measured", _NUDGE)
        _expected(axes, [pairing.expected_step for pairing in pairings], ORANGE, "s", "decode step, by bytes", _NUDGE)


def _sizes(axes: "Axes", pairings: Sequence[Pairing]) -> None:
    memory = [pairing.memory_ratio for pairing in pairings]
    axes.plot(range(len(memory)), memory, "D--", color=GREY, markersize=5, label="peak memory")
    cache = [ratio for pairing in pairings if (ratio := pairing.cache_ratio) is not None]
    if cache:
        axes.plot(range(len(cache)), cache, "^-", color=GREEN, markersize=6, label="cache")


def _measured(axes: "Axes", ratios: Sequence[Spread], colour: str, marker: str, label: str, nudge: float) -> None:
    medians = [ratio.median for ratio in ratios]
    low = [ratio.median - ratio.quartiles[0] for ratio in ratios]
    high = [ratio.quartiles[1] - ratio.median for ratio in ratios]
    places = [place + nudge for place in range(len(ratios))]
    axes.errorbar(
        places, medians, yerr=[low, high], fmt=f"{marker}-", color=colour, markersize=6, capsize=3, label=label
    )


def _expected(axes: "Axes", ratios: Sequence[float | None], colour: str, marker: str, label: str, nudge: float) -> None:
    if all(ratio is None for ratio in ratios):
        return
    values = [float("nan") if ratio is None else ratio for ratio in ratios]
    places = [place + nudge for place in range(len(ratios))]
    axes.plot(
        places,
        values,
        f"{marker}:",
        color=colour,
        markersize=6,
        markerfacecolor="none",
        linewidth=1.2,
        zorder=4,
        label=label,
    )
