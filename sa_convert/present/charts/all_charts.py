"""The figures of an analysis."""

from pathlib import Path

from sa_convert.domain.analysis import Analysis
from sa_convert.present.charts.chart_attention import isotropy_chart, similarity_chart
from sa_convert.present.charts.chart_costs import cost_chart, loss_chart
from sa_convert.present.charts.chart_frontier import frontier_chart
from sa_convert.present.charts.chart_parts import save
from sa_convert.present.charts.chart_sources import source_chart
from sa_convert.present.charts.chart_treatments import treatment_chart

CHARTS = {
    "similarity.png": similarity_chart,
    "isotropy.png": isotropy_chart,
    "costs.png": cost_chart,
    "loss.png": loss_chart,
    "sources.png": source_chart,
}
"""File and what draws it."""


def write_charts(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw every chart into the folder, which is made if need be. Takes a second for each."""
    drawn = [
        save(lambda draw=draw: draw(analysis), folder / name)  # type: ignore[misc]
        for name, draw in CHARTS.items()
        if _has_something(name, analysis)
    ]
    frontier = analysis.frontier
    if frontier is not None:
        drawn.append(save(lambda: frontier_chart(frontier, analysis.base_model.id), folder / "frontier.png"))
        if analysis.treatments:
            drawn.append(save(lambda: treatment_chart(analysis), folder / "treatments.png"))
    return drawn


def _has_something(name: str, analysis: Analysis) -> bool:
    """Whether an analysis holds what a chart shows."""
    if name == "loss.png":
        return bool(analysis.curve)
    return name not in ("costs.png", "sources.png") or any(cost.sources for cost in analysis.costs)
