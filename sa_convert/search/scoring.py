"""The pass that fills `Costs`: attention of every layer, gradients, and sums over tokens."""

from collections.abc import Iterator, Sequence

import torch

from sa_convert.console.progress import progress
from sa_convert.domain.calibrated import Measure
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.domain.units import Unit, Units
from sa_convert.observe.gradients import fisher_gradients, output_directions
from sa_convert.observe.probe import Probe, Seen, Sources
from sa_convert.observe.sequences import Sample
from sa_convert.search.costs import Costs, shortlists
from sa_convert.treatments.share.rules import layer_difference

SHORTLIST = 24
"""Sources that are kept for each head. More changed no choice on SmolLM2-135M."""

_SCREENED = 4
"""Sequences (of text, and one of repetition) whose costs of all pairs choose the shortlists."""


def collect(
    probe: Probe,
    units: Units,
    samples: Sequence[Sample],
    sharing: SharingMap,
    measure: Measure = "fisher",
    seed: int = 0,
    description: str = "costs of sharing",
    known: Costs | None = None,
) -> Costs:
    """Costs of every unit under a map, of which `Costs` explains the terms.

    A unit that the map shares already is costed too: with other sources, and with its own attention again. Sequences
    count by their `weight`. known: costs whose pairs choose the shortlists, instead of a first look at some samples.
    Raises CheckpointError where a loss or an activation is not finite.
    """
    borrowed: Sources = sharing.layers
    costs = Costs(units, measure, without_map=not borrowed)
    screen = [] if known else _screen(samples)
    allowed = {layer: _allowed(units, layer, borrowed) for layer in range(len(units.geometry.layers))}
    allowed = {layer: mask for layer, mask in allowed.items() if bool(mask.any())}
    generator = torch.Generator().manual_seed(seed)
    with progress(len(screen) + len(samples), description, unit="seq") as bar:
        total = sum(sample.weight for sample in screen)
        for sample in screen:
            for layer, changes, first in _pass(probe, units, sample, borrowed, measure, generator, allowed):
                scale = sample.weight / total / sample.tokens_scored
                pairs = changes.square().sum(0).mul_(0.5).add_(first).T.mul(scale)
                costs.pairs[layer] = costs.pairs[layer] + pairs if layer in costs.pairs else pairs
            bar.update()
        if known:
            costs.pairs = known.pairs
        costs.shortlist = shortlists(costs.pairs, units, allowed, borrowed, SHORTLIST)
        candidates = [unit for unit in units.all if unit.layer in allowed]
        total = sum(sample.weight for sample in samples)
        slopes: dict[Unit, list[torch.Tensor]] = {unit: [] for unit in candidates}
        for sample in samples:
            for layer, changes, first in _pass(probe, units, sample, borrowed, measure, generator, allowed):
                scale = sample.weight / total / sample.tokens_scored
                for unit in (unit for unit in candidates if unit.layer == layer):
                    second, slope = _moments(costs, unit, changes, first)
                    costs.second[unit] = costs.second.get(unit, 0.0) + second * scale
                    slopes[unit].append(slope * scale)
            bar.update()
        costs.first = {unit: _certain(torch.stack(found)) for unit, found in slopes.items()}
    return costs


def _moments(costs: Costs, unit: Unit, changes: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the second moments, and the first-order term, over a unit's shortlist. changes: (T, J, H); first: (J, H)."""
    short = costs.shortlist[unit.layer]
    e = torch.cat([changes[:, short[head], head] for head in unit.heads], dim=1)  # (T, heads * K)
    return (e.T @ e).mul_(0.5), torch.cat([first[short[head], head] for head in unit.heads])


def _certain(slopes: torch.Tensor) -> torch.Tensor:
    """The sum of slopes (samples, n) over samples, a standard error nearer to 0.

    A search picks what looks best among thousands of choices; with few samples that is mostly what is noisiest.
    """
    count, total = len(slopes), slopes.sum(0)
    if count < 2:
        return total
    error = slopes.std(0) * count**0.5
    certain: torch.Tensor = total.sign() * (total.abs() - error).clamp(min=0)
    return certain


def _screen(samples: Sequence[Sample]) -> list[Sample]:
    text = [sample for sample in samples if not sample.repetition]
    return text[:: max(1, len(text) // _SCREENED)][:_SCREENED] + [s for s in samples if s.repetition][:1]


def _allowed(units: Units, layer: int, borrowed: Sources) -> torch.Tensor:
    """(J,) bool: whether a head of this or an earlier layer may be a source for the layer, under a map."""
    layers = units.geometry.layers
    allowed = torch.zeros(units.offsets[layer + 1], dtype=torch.bool)
    for source in range(layer):
        if layer_difference(layers[source], layers[layer]) is None:
            row = borrowed.get(source, (None,) * layers[source].heads)
            allowed[units.offsets[source] : units.offsets[source + 1]] = torch.tensor([head is None for head in row])
    return allowed


def _pass(
    probe: Probe,
    units: Units,
    sample: Sample,
    borrowed: Sources,
    measure: Measure,
    generator: torch.Generator,
    allowed: dict[int, torch.Tensor],
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each layer, e (T, J, H) at the scored tokens, and the summed first-order term (J, H)."""
    layers = units.geometry.layers
    stacks: dict[str, torch.Tensor] = {}  # (T, J, S) probabilities of all heads, in each stack
    seen: dict[int, Seen] = {}

    def observe(layer: Seen) -> None:
        start, stop = units.offsets[layer.layer : layer.layer + 2]
        name = layers[layer.layer].stack
        if name not in stacks:
            _, _, tokens, length = layer.probabilities.shape
            stacks[name] = torch.zeros(tokens, units.offsets[-1], length)
        stacks[name][:, start:stop] = layer.probabilities.detach()[0].transpose(0, 1).float()
        layer.output.retain_grad()
        seen[layer.layer] = layer

    if measure == "fisher":
        losses = fisher_gradients(probe, sample, borrowed, observe, generator)
    else:
        losses = output_directions(probe, sample, borrowed, observe, generator, seen)
    first: dict[int, torch.Tensor] = {}
    for order, gradients in losses:
        for layer in sorted(allowed):
            stack = stacks[layers[layer].stack]
            e = _changes(stack[:, : units.offsets[layer + 1]], seen[layer], gradients[layer])
            if order == "first":
                # Of random repetition, only what comes with tokens that can be predicted.
                first[layer] = (e[:-1][sample.scored[1:]] if sample.repetition else e).sum(0)
                continue
            yield layer, e, first.get(layer, torch.zeros(e.shape[1:]))


def _changes(stack: torch.Tensor, seen: Seen, gradient: torch.Tensor) -> torch.Tensor:
    """e (T, J, H) of one layer. stack (T, J, T); gradient (T, H, D) at the layer's head outputs."""
    value = seen.value.detach()[0].float()  # (G, T, D)
    value = value.repeat_interleave(gradient.shape[1] // value.shape[0], dim=0)
    u = gradient.float().transpose(0, 1)  # (H, T, D)
    products = torch.matmul(u, value.transpose(1, 2))  # (H, T, T)
    e: torch.Tensor = torch.bmm(stack, products.permute(1, 2, 0).contiguous())
    return e.sub_((seen.output.detach()[0].float() * gradient.float()).sum(-1)[:, None])
