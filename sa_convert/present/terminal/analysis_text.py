"""How an analysis is shown in a terminal."""

import math
from collections.abc import Iterator

from sa_convert.console.amounts import human_bytes
from sa_convert.domain.analysis import Analysis
from sa_convert.domain.frontier import Frontier
from sa_convert.domain.stacks import in_stack, layer_label, layer_names
from sa_convert.present.terminal.aligned import aligned

SHOWN = 5
"""Units that are listed."""


def render_analysis(analysis: Analysis) -> str:
    """An aligned table, without a final newline."""
    return aligned(_rows(analysis))


def _rows(analysis: Analysis) -> Iterator[tuple[str, str]]:
    text = analysis.calibration
    yield "Base model", f"{analysis.base_model.id} ({analysis.family}), run in {analysis.dtype}"
    yield "Calibration", f"{text.text}: {text.sequences} sequences of {text.length} tokens, seed {text.seed}"
    yield "Costs", f"{analysis.measure}, in {analysis.cost_unit}"
    priced = sorted((cost for cost in analysis.costs if cost.cost is not None), key=lambda cost: cost.cost or 0.0)
    for number, cost in enumerate(priced[:SHOWN]):
        groups = "all heads" if len(cost.unit.groups) > 1 else f"group {cost.unit.groups[0]}"
        told = ", ".join(name for name, _, value in cost.offers if value == cost.cost)
        shown = (cost.sources or ())[:8]
        sources = ", ".join(f"{in_stack(analysis.stacks, layer).number}.{head}" for layer, head in shown)
        more = ", ..." if len(cost.sources or ()) > 8 else ""
        label = "Cheapest" if number == 0 else ""
        layer = layer_label(analysis.stacks, cost.unit.layer)
        how = f"sources (layer.head) {sources}{more}" if sources else told
        yield label, f"layer {layer} {groups}: {cost.cost:.2g}, {how}"
    yield from _frontier_rows(analysis.frontier, analysis) if analysis.frontier else _curve_rows(analysis)
    yield "Peak memory", human_bytes(analysis.peak_memory)


def _curve_rows(analysis: Analysis) -> Iterator[tuple[str, str]]:
    for number, point in enumerate(analysis.curve):
        change = f"loss {point.measured_loss:+.4f} nats ({math.expm1(point.measured_loss):+.2%} perplexity)"
        label = f"{analysis.keys_name.capitalize()} removed" if number == 0 else ""
        yield label, f"{point.key_cache_removed:5.1%}: {change}, {point.groups} groups borrow"
    yield "", "measured on held-out sequences, without refit"
    layers = layer_names(analysis.stacks, analysis.plan.layers)
    plural = "layer" if len(analysis.plan.layers) == 1 else "layers"
    removed = f"{analysis.key_cache_removed:.1%} of the {analysis.keys_name}"
    yield "Recipe", f"removes {removed}; heads of {plural} {layers} borrow"


def _frontier_rows(frontier: Frontier, analysis: Analysis) -> Iterator[tuple[str, str]]:
    """Of all treatments together; frontier.csv has those of each alone, too."""
    points = next(iter(frontier.lines().values()), [])
    for number, point in enumerate(points):
        change = f"loss {point.loss:+.4f} ± {point.error:.4f} nats ({math.expm1(point.loss):+.2%} perplexity)"
        worst = point.worst_copying
        over = f"over {worst[0]} tokens" if worst and worst[0] else "of facts in long text"
        copying = f", copying {worst[1]:+.2f} nats {over}" if worst else ""
        label = f"Saved at {frontier.at} tokens" if number == 0 else ""
        yield label, f"{point.cache.removed:5.1%}: {change}{copying}; {point.recipe}"
    yield "", "measured on held-out long text and repetition, without refit"
    chosen = next((point for point in points if point.plan == analysis.plan), None)
    if chosen is not None:
        yield "Recipe", f"recipe.yaml is {chosen.recipe}"
