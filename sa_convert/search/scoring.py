"""The passes that fill ledgers: attention of every layer, gradients, and sums over tokens."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from sa_convert.console.progress import progress
from sa_convert.domain.calibrated import Measure
from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Units
from sa_convert.models.processes import in_share, shared
from sa_convert.observe.gradients import fisher_gradients, output_directions, pass_over
from sa_convert.observe.probe import Probe, Seen, SeenInBlocks
from sa_convert.observe.sequences import Sample
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.ledger import Attended, Ledger, Observed

Ledgers = Mapping[str, Ledger]
"""One for each treatment, by its name."""

SCREENED = 4
"""Sequences (of text, and one of repetition) that are shown beforehand to ledgers that ask for it."""


def collect(
    probe: Probe,
    units: Units,
    samples: Sequence[Sample],
    plan: Plan,
    treatments: Sequence[Treatment],
    *,
    measure: Measure = "fisher",
    seed: int = 0,
    description: str = "costs",
    known: Ledgers | None = None,
    long: Sequence[Sample] = (),
    screened: int = SCREENED,
) -> dict[str, Ledger]:
    """Costs of every unit under a plan, for each treatment.

    Sequences count by their `weight`. known: the ledgers that were filled without a plan. long: the sequences of
    ledgers that ask for long ones. screened: see SCREENED. Several processes share the sequences. Raises
    CheckpointError if a loss or an activation is not finite.
    """
    known = known or {}
    ledgers = {found.name: found.ledger(units, plan, measure, known.get(found.name)) for found in treatments}
    short, far = ([one for one in ledgers.values() if one.long == kind] for kind in (False, True))
    screening = [ledger for ledger in short if ledger.screens]
    screen = _screen(samples, screened) if screening else []
    samples, long = samples if short else (), long if far else ()
    generator = torch.Generator().manual_seed(seed)
    states = any(ledger.reads_states for ledger in short)

    def passed(sample: Sample, among: Sequence[Sample]) -> Iterator[Observed]:
        total = sum(one.weight for one in among)
        options = {"measure": measure, "generator": generator, "total": total, "states": states}
        return observe(probe, units, sample, plan, **options)  # type: ignore[arg-type]

    def passed_over(sample: Sample) -> None:
        pass_over(probe, sample, generator, measure)

    with progress(sum(map(in_share, (screen, samples, long))), description, unit="seq") as bar:
        for _, sample in shared(screen, passed_over):
            for observed in passed(sample, screen):
                for ledger in screening:
                    ledger.screen(observed)
            bar.update()
        for ledger in screening:
            ledger.join(screening=True)
            ledger.screened()
        for _, sample in shared(samples, passed_over):
            for observed in passed(sample, samples):
                for ledger in short:
                    ledger.add(observed)
            bar.update()
        for ledger in far:
            ledger.tested_by([sample.period for sample in long if sample.repetition])
        for at, sample in shared(long, passed_over):
            weight = sample.weight / _in_all(long) / sample.tokens_scored
            for attended in attend(probe, sample, plan, at, measure=measure, generator=generator, weight=weight):
                for ledger in far:
                    ledger.attend(attended)
            bar.update()
        for ledger in ledgers.values():
            ledger.join()
            ledger.close()
    return ledgers


def _screen(samples: Sequence[Sample], count: int) -> list[Sample]:
    text = [sample for sample in samples if not sample.repetition]
    return text[:: max(1, len(text) // count)][:count] + [s for s in samples if s.repetition][:1]


def _in_all(long: Sequence[Sample]) -> float:
    """What costs of long sequences are divided by."""
    return sum(sample.weight for sample in long)


def attend(
    probe: Probe,
    sample: Sample,
    plan: Plan,
    number: int = 0,
    *,
    measure: Measure,
    generator: torch.Generator,
    weight: float,
) -> Iterator[Attended]:
    """As `observe`, of a long sequence. number: of the sequence. weight: of each of its scored tokens."""
    seen: dict[int, Any] = {}

    def note(layer: Any) -> None:
        seen[layer.layer] = layer

    with probe.in_blocks():
        if measure == "fisher":
            losses = fisher_gradients(probe, sample, plan, note, generator)
        else:
            losses = output_directions(probe, sample, plan, note, generator, seen)
        for order, gradients in losses:
            for index in sorted(gradients):
                layer = seen[index]
                yield Attended(
                    layer=index,
                    blocks=partial(_blocks, layer),
                    value=layer.value.detach()[0],
                    output=layer.output.detach()[0],
                    gradient=gradients[index],
                    slope=order == "first",
                    scored=sample.scored,
                    repetition=sample.repetition,
                    weight=weight,
                    sample=number,
                )


@torch.no_grad()
def _blocks(layer: SeenInBlocks) -> Iterator[tuple[int, torch.Tensor]]:
    for start, probabilities in layer.blocks():
        yield start, probabilities[0].float()


def observe(
    probe: Probe,
    units: Units,
    sample: Sample,
    plan: Plan,
    *,
    measure: Measure,
    generator: torch.Generator,
    total: float = 1.0,
    states: bool = False,
) -> Iterator[Observed]:
    """Every layer in a pass over a sequence: first, under a plan, with the slope of the divergence from the base, then
    with the gradient of the loss. total: weight of all sequences. states: whether to tell what goes into layers."""
    layers = units.geometry.layers
    stacks: dict[str, torch.Tensor] = {}  # (T, J, S) probabilities of all heads, in each stack
    seen: dict[int, Seen] = {}

    def note(layer: Seen) -> None:
        start, stop = units.offsets[layer.layer : layer.layer + 2]
        name = layers[layer.layer].stack
        if name not in stacks:
            _, _, tokens, length = layer.probabilities.shape
            stacks[name] = torch.zeros(tokens, units.offsets[-1], length)
        stacks[name][:, start:stop] = layer.probabilities.detach()[0].transpose(0, 1).float()
        layer.output.retain_grad()
        seen[layer.layer] = layer

    if measure == "fisher":
        losses = fisher_gradients(probe, sample, plan, note, generator)
    else:
        losses = output_directions(probe, sample, plan, note, generator, seen)
    told: dict[int, torch.Tensor] = {}

    def take(index: int, given: torch.Tensor, _: torch.Tensor) -> None:
        told[index] = given.detach()[0]

    with probe.watching([index for index, layer in enumerate(layers) if layer.heads and states], take):
        for order, gradients in losses:
            for index in sorted(gradients):
                layer = seen[index]
                yield Observed(
                    layer=index,
                    probabilities=stacks[layers[index].stack][:, : units.offsets[index + 1]],
                    value=layer.value.detach()[0],
                    output=layer.output.detach()[0],
                    gradient=gradients[index],
                    slope=order == "first",
                    scored=sample.scored,
                    repetition=sample.repetition,
                    weight=sample.weight / total / sample.tokens_scored,
                    states=told.get(index),
                    query=layer.query.detach()[0],
                    key=layer.key.detach()[0],
                    turned=probe.turner(index),
                )
