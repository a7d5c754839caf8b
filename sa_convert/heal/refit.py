"""Refit: the output projections of changed layers, fitted by ridge regression to what the base's attention put out.

Layer by layer: the base and the changed model run side by side, so that a layer sees what refitted layers before it
have made of its input. W is the matrix with the least |X W - Y|^2 + s |W - W0|^2, where X is the projection's input in
the changed model, Y its output in the base, W0 the base's matrix and s the strength that does best on held-out samples.
A layer's refit is kept only if it lowers the squared error on held-out text and on held-out repetition alike, and
all of them only if they bring the model's predictions nearer to the base's (`refit`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sa_convert.console.progress import progress
from sa_convert.domain.calibrated import LayerRefit, RefitReport
from sa_convert.domain.plan import Plan
from sa_convert.heal.ridge import Sums, combine, solve
from sa_convert.models.processes import in_share, shared, summed
from sa_convert.observe.probe import Loans, Probe
from sa_convert.observe.replay import Replay, captured
from sa_convert.observe.sequences import Sample
from sa_convert.observe.tried import Reference

if TYPE_CHECKING:
    from sa_convert.observe.session import Session

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

SHARES = (1.0, 0.5)
"""Parts of the way from the base's matrices to the refitted ones that are tried, until one helps."""


@dataclass(frozen=True)
class Refit:
    """changes: (output, input) by layer, float32: what to add to the weight of its output projection."""

    changes: Mapping[int, torch.Tensor]
    report: RefitReport


def refit(session: "Session", plan: Plan, reference: Reference) -> Refit:
    """Fit the output projections of all layers that a plan changes, and judge them on held-out samples.

    reference: of the held-out samples, made from the base model. The session's model has its own weights afterwards.
    """
    probe, samples = session.probe, session.samples
    fitted, layers = fit_layers(probe, plan, samples.fit, samples.held_out)
    before = reference.measure(plan, "without refit")
    about = (samples.text, len(samples.fit), len(samples.fit[0].tokens))
    for share in SHARES if fitted else ():
        changes = {layer: share * change for layer, change in fitted.items()}
        with changed(probe, changes):
            after = reference.measure(plan, "with refit")
        if after.no_worse(before):
            return Refit(changes, RefitReport(share, layers, before, after, *about))
    return Refit({}, RefitReport(0.0, layers, before, before, *about))


def with_projection(plan: Plan) -> frozenset[int]:
    """The layers that a plan changes, without those that lose their attention as a whole."""
    return frozenset(layer for layer, told in plan.layers.items() if not isinstance(told, str))


def fit_layers(
    probe: Probe, plan: Plan, fit: tuple[Sample, ...], held_out: tuple[Sample, ...]
) -> tuple[dict[int, torch.Tensor], dict[int, LayerRefit]]:
    """The changes (output, input) that help on held-out samples, by layer, and what was found for every layer."""
    if probe.family.encoder_decoder:
        return _fit_in_passes(probe, plan, fit, held_out)
    return _fit_in_replay(probe, plan, fit, held_out)


def _fit_in_replay(
    probe: Probe, plan: Plan, fit: tuple[Sample, ...], held_out: tuple[Sample, ...]
) -> tuple[dict[int, torch.Tensor], dict[int, LayerRefit]]:
    """Base and changed model side by side, layer by layer."""
    samples = [sample for _, sample in shared((*fit, *held_out))]
    replay = Replay(probe, samples)
    own = base = replay.states
    chunks = [slice(start, start + replay.batch) for start in range(0, len(samples), replay.batch)]
    loans: list[Loans] = [{} for _ in chunks]
    first, last = min(plan.layers, default=0), max(plan.layers, default=-1)
    refitted = with_projection(plan)
    fits: dict[int, LayerRefit] = {}
    changes: dict[int, torch.Tensor] = {}
    with progress(last + 1, "refit", unit="layer") as bar, torch.no_grad():
        for layer in range(last + 1):
            if layer == first:
                base = own.clone()
            if layer in refitted:
                work = _LayerFit(in_share(fit))
                for chunk, loan in zip(chunks, loans, strict=True):
                    with captured(probe.output_projections[layer], work.note):
                        base[chunk] = replay.run(layer, base[chunk])
                        with probe.trying(plan), probe.lending(dict(loan)):
                            replay.run(layer, own[chunk])
                    work.add(samples, chunk)
                change, fits[layer] = work.solve()
                if change is not None:
                    changes[layer] = change
            elif layer >= first:
                for chunk in chunks:
                    base[chunk] = replay.run(layer, base[chunk])
            here = {layer: changes[layer]} if layer in changes else {}
            with changed(probe, here), probe.trying(plan):
                for chunk, loan in zip(chunks, loans, strict=True):
                    with probe.lending(loan):
                        own[chunk] = replay.run(layer, own[chunk])
            bar.update()
    return changes, fits


def _fit_in_passes(
    probe: Probe, plan: Plan, fit: tuple[Sample, ...], held_out: tuple[Sample, ...]
) -> tuple[dict[int, torch.Tensor], dict[int, LayerRefit]]:
    """Whole passes of the base and of the changed model for every layer: for models in which layers are not one chain,
    but read what an encoder has made of the text."""
    samples = [sample for _, sample in shared((*fit, *held_out))]
    fits: dict[int, LayerRefit] = {}
    changes: dict[int, torch.Tensor] = {}
    order = [layer for layer in probe.order() if layer in with_projection(plan)]
    with progress(len(order), "refit", unit="layer") as bar, torch.no_grad():
        for layer in order:
            work = _LayerFit(in_share(fit))
            for at, sample in enumerate(samples):
                inputs = sample.inputs(probe.model)
                with captured(probe.output_projections[layer], work.note):
                    inputs.logits(probe.model)
                    with probe.trying(plan), changed(probe, changes):
                        inputs.logits(probe.model)
                work.add(samples, slice(at, at + 1))
            change, fits[layer] = work.solve()
            if change is not None:
                changes[layer] = change
            bar.update()
    return changes, fits


@dataclass
class _LayerFit:
    """The regression of one layer: sums over fitted and held-out samples, of text and of repetition.

    fitted: how many of the samples are learned from.
    """

    fitted: int
    sums: dict[tuple[bool, bool], Sums] = field(default_factory=dict)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def note(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Input and output of the layer's projection: first in the base model, then in the changed one."""
        self.seen.append((inputs.reshape(*output.shape[:-1], -1).float().cpu(), output.float().cpu()))

    def add(self, samples: Sequence[Sample], chunk: slice) -> None:
        """Add what was noted of a chunk of the samples."""
        (_, wanted), (inputs, output) = self.seen
        self.seen.clear()
        for at, sample in enumerate(samples[chunk]):
            key = (chunk.start + at < self.fitted, sample.repetition)
            x, error = inputs[at], (wanted - output)[at]
            if sample.repetition:  # only what comes with tokens that can be predicted
                x, error = x[sample.scored], error[sample.scored]
            self.sums.setdefault(key, Sums()).add(x, error)

    def _join(self) -> None:
        """Put together what several processes have seen."""
        parts = {(key, name): part for key, sums in self.sums.items() for name, part in vars(sums).items()}
        for (key, name), part in summed(parts).items():
            setattr(self.sums.setdefault(key, Sums()), name, part)

    def solve(self) -> tuple[torch.Tensor | None, LayerRefit]:
        """The change (output, input), or None if no strength helps on all held-out samples, of all processes."""
        self._join()
        fit = combine([(1.0, sums) for (fitted, _), sums in self.sums.items() if fitted])
        held = {repetition: sums for (fitted, repetition), sums in self.sums.items() if not fitted}
        best: tuple[float, float, Any, dict[bool, float]] | None = None
        for strength in STRENGTHS:
            change = solve(fit, strength)
            left = {repetition: sums.remaining(change) for repetition, sums in held.items()}
            mean = sum(left.values()) / len(left)
            if max(left.values()) < 1 and (best is None or mean < best[0]):
                best = mean, strength, change, left
        if best is None:
            return None, LayerRefit(None, 1.0, 1.0 if True in held else None)
        _, strength, change, left = best
        # The projection holds (output, input); least squares finds (input, output).
        return change.T.contiguous(), LayerRefit(strength, left.get(False, 1.0), left.get(True))


@contextmanager
def changed(probe: Probe, changes: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """While open, these layers' output projections have these changes (output, input) added to their weights.

    The weights themselves stay, and may be anywhere: they are only in memory while their module runs.
    """

    def hook(change: torch.Tensor) -> Any:
        def apply(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + functional.linear(args[0], change.to(output.device, output.dtype))

        return apply

    handles = [probe.output_projections[layer].register_forward_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
