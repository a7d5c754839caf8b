"""The methods that the benchmark compares with: hooks on the attention modules of an unmodified base model.

- deletion (LLM-Drop, He et al. 2024): the attention block adds nothing to the residual stream.
- linear map (NBL, Erdogan et al. 2025): the attention block is an affine map of its normalised input, fitted by least
  squares to what the block computed.
- the paper's spans (Shared Attention): consecutive layers use the attention weights of the layer before, head by head.

Layers and spans are chosen by the KL divergence from the base model that they cause on held-out calibration samples,
measured again with the layers in place that were chosen before. The papers take criteria that need no such
measurement: LLM-Drop the cosine similarity of what goes into a block and what comes out, NBL a bound on the error of
the linear map, Shared Attention the similarity of attention weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sa_convert.models.arguments import first_argument
from sa_convert.observe.sequences import CalibrationSet, Sample

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the ridge, relative to the mean square of an input; that with the least error on held-out samples is taken."""

SCORED_TOKENS = 256
"""Of each sample, in choosing layers and spans."""


@dataclass(frozen=True)
class Affine:
    """x -> x @ weight + bias. weight: (hidden, hidden); bias: (hidden,)."""

    weight: torch.Tensor
    bias: torch.Tensor


@contextmanager
def replaced(attentions: Sequence[Any], maps: "Mapping[int, Affine | None]") -> Iterator[None]:
    """While open, the attention of these layers gives an affine map of its input, or zero if the map is None."""

    def hook(new: Affine | None) -> Callable[..., Any]:
        def replace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            states, _ = first_argument(module, args, kwargs)
            made = torch.zeros_like(output[0]) if new is None else states @ new.weight + new.bias
            return (made, *output[1:])

        return replace

    handles = [attentions[layer].register_forward_hook(hook(new), with_kwargs=True) for layer, new in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Moments:
    """Sums over tokens of inputs X (tokens, n) and outputs Y (tokens, m): X'X, X'Y and the square of Y.

    The last input is the constant 1.
    """

    gram: "torch.Tensor | float" = 0.0
    cross: "torch.Tensor | float" = 0.0
    square: float = 0.0

    def add(self, states: torch.Tensor, output: torch.Tensor, weight: float) -> None:
        inputs = torch.cat([states, torch.ones(len(states), 1)], dim=1)
        self.gram = self.gram + weight * (inputs.T @ inputs).double()
        self.cross = self.cross + weight * (inputs.T @ output).double()
        self.square += weight * output.double().square().sum().item()

    def solve(self, strength: float) -> torch.Tensor:
        """(n, m) with the least squared error plus a ridge, which does not pull on the constant."""
        assert isinstance(self.gram, torch.Tensor)
        gram = self.gram.clone()
        diagonal = gram.diagonal()
        diagonal[:-1] += strength * diagonal[:-1].mean()
        return torch.linalg.solve(gram, self.cross)

    def error(self, solution: torch.Tensor) -> float:
        """The squared error as a part of the square of Y."""
        left = self.square - 2 * (solution * self.cross).sum() + (solution * (self.gram @ solution)).sum()
        return float(left) / self.square


def fit_linear(model: Any, attentions: Sequence[Any], samples: CalibrationSet) -> dict[int, Affine]:
    """For every layer the affine map from the input of its attention to its output in the base model, with the least
    squared error over the samples, which count by their weight."""
    fit = _moments(model, attentions, samples.fit)
    held = _moments(model, attentions, samples.held_out)
    found = {}
    for layer, moments in enumerate(fit):
        best = min((moments.solve(strength) for strength in STRENGTHS), key=held[layer].error).float()
        found[layer] = Affine(best[:-1], best[-1])
    return found


def _moments(model: Any, attentions: Sequence[Any], samples: Sequence[Sample]) -> list[Moments]:
    moments = [Moments() for _ in attentions]
    weight = 1.0

    def adder(into: Moments) -> Callable[..., None]:
        def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            states, _ = first_argument(module, args, kwargs)
            into.add(states[0], output[0][0], weight)

        return add

    handles = [
        attention.register_forward_hook(adder(into), with_kwargs=True)
        for attention, into in zip(attentions, moments, strict=True)
    ]
    try:
        with torch.no_grad():
            for sample in samples:
                weight = sample.weight
                model(input_ids=sample.tokens[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return moments


class Divergence:
    """KL divergence from the base model on calibration samples: what ours is searched by, so that all are chosen alike.

    A loss would not do: deleting some layers of SmolLM2-135M makes it copy random tokens better and predict text worse.
    """

    def __init__(self, model: Any, samples: Iterable[Sample]) -> None:
        """model: the base, as it is."""
        self.model = model
        self._parts: list[tuple[Sample, torch.Tensor]] = []
        for sample in samples:
            if bool(sample.scored[1:SCORED_TOKENS].any()):
                self._parts.append((sample, self._chances(sample)))

    def __call__(self) -> float:
        """Nats a token of the model as it is now, on the first SCORED_TOKENS tokens of each sample; samples count by
        their weight."""
        total = weights = 0.0
        for sample, base in self._parts:
            found = functional.kl_div(self._chances(sample), base, log_target=True, reduction="none").sum(-1).mean()
            total, weights = total + sample.weight * found.item(), weights + sample.weight
        return total / weights

    def _chances(self, sample: Sample) -> torch.Tensor:
        """(scored tokens, vocabulary) logarithms."""
        with torch.inference_mode():
            logits = self.model(input_ids=sample.tokens[None, :SCORED_TOKENS], use_cache=False).logits[0, :-1]
            return functional.log_softmax(logits[sample.scored[1:SCORED_TOKENS]].float(), dim=-1)


def cheapest_layers(count: int, depth: int, cost_of: Callable[[tuple[int, ...]], float]) -> Iterator[tuple[int, ...]]:
    """The cheapest layer, the cheapest two, ... up to `count`, each with those before it.

    cost_of: what it costs to replace these layers. What a layer adds to it seldom falls as others are replaced, so in
    each round layers are measured in the order of what they added last, until none left added less than the best.
    """
    chosen: tuple[int, ...] = ()
    present = 0.0
    added = dict.fromkeys(range(depth), -math.inf)
    for _ in range(count):
        measured: dict[int, float] = {}
        for layer in sorted(added, key=added.__getitem__):
            if measured and min(measured.values()) <= added[layer]:
                break
            measured[layer] = cost_of((*chosen, layer)) - present
        added |= measured
        best = min(measured, key=measured.__getitem__)
        chosen, present = (*chosen, best), present + added.pop(best)
        yield chosen


Spans = tuple[tuple[int, int], ...]
"""First and last borrowing layer of each span; the layer before the first is its source."""


def span_candidates(depth: int, layers: int) -> list[Spans]:
    """Ways to let `layers` late layers borrow: spans of 1, 2 or 4 layers or one of all, one after the other, the last
    of them ending at one of the last three layers."""
    found: list[Spans] = []
    for size in (1, 2, 4, layers):
        count = -(-layers // size)
        sizes = [layers // count + (at < layers % count) for at in range(count)]
        for end in (depth - 1, depth - 2, depth - 3):
            spans, last = [], end
            for length in reversed(sizes):
                spans.insert(0, (last - length + 1, last))
                last -= length + 1
            if spans[0][0] >= 1 and tuple(spans) not in found:
                found.append(tuple(spans))
    return found


def span_rows(spans: Spans, heads: int) -> dict[int, tuple[tuple[int, int], ...]]:
    """As a map: head i of every layer borrows from head i of the span's source."""
    return {
        layer: tuple((first - 1, head) for head in range(heads))
        for first, last in spans
        for layer in range(first, last + 1)
    }
