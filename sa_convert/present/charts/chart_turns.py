"""The chart of a timed conversation: time to the first token of each turn, with the kept cache and without."""

from typing import TYPE_CHECKING

from sa_convert.domain.turn_times import TurnsBenchmark
from sa_convert.present.charts.chart_parts import BLUE, ORANGE, paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def turns_chart(benchmark: TurnsBenchmark) -> "Figure":
    """One picture for each model, all to the same scale."""
    models = benchmark.models
    figure = paper("Time to the first token of each turn", max(5.4, 4.2 * len(models)), 3.8)
    for axes, conversation in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models, strict=True):
        turns = conversation.turns
        tokens = [turn.history + turn.new for turn in turns]
        axes.plot(tokens, [turn.recomputed.median for turn in turns], "s--", color=ORANGE, label="computed again")
        kept = [(place, turn.kept.median) for place, turn in zip(tokens, turns, strict=True) if turn.kept is not None]
        axes.plot(*zip(*kept, strict=True), "o-", color=BLUE, label="from the file") if kept else None
        axes.set_title(conversation.id, fontsize=10)
        axes.set_xlabel("tokens of the conversation so far")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("seconds")
    return figure
