"""Refit: the output projections of reusing layers, fitted by ridge regression to what the base's attention put out.

Layer by layer: the base and the shared model run side by side, so that a layer sees what refitted layers before it have
made of its input. W is the matrix with the least |X W - Y|^2 + s |W - W0|^2, where X is the projection's input in the
shared model, Y its output in the base, W0 the base's matrix and s the strength that does best on held-out samples. A
layer's refit is kept only where it lowers the squared error on held-out text and on held-out repetition alike, and all
of them only where they bring the model's predictions nearer to the base's (`refit`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sa_convert.calibrate.measure import Reference
from sa_convert.calibrate.probe import Loans, Probe, Rows
from sa_convert.calibrate.replay import Replay, captured
from sa_convert.calibrate.ridge import Sums, combine, solve
from sa_convert.calibrate.sequences import Sample
from sa_convert.data.calibrated import LayerRefit, RefitReport
from sa_convert.progress import progress

if TYPE_CHECKING:
    import torch

    from sa_convert.calibrate.session import Session

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

SHARES = (1.0, 0.5)
"""Parts of the way from the base's matrices to the refitted ones that are tried, until one helps."""


@dataclass(frozen=True)
class Matrices:
    """(output, input) of a projection, float32: of the base, and fitted."""

    base: "torch.Tensor"
    fitted: "torch.Tensor"

    def between(self, share: float) -> "torch.Tensor":
        return self.fitted if share == 1.0 else self.base + share * (self.fitted - self.base)


@dataclass(frozen=True)
class Refit:
    """weights: (output, input) of each refitted projection by layer, float32."""

    weights: "Mapping[int, torch.Tensor]"
    report: RefitReport


def refit(session: "Session", rows: Rows, reference: Reference) -> Refit:
    """Fit the output projections of all layers that reuse, and judge them on held-out samples.

    reference: of the held-out samples, made from the base model. The session's model has its own weights afterwards.
    """
    probe, samples = session.probe, session.samples
    fitted, layers = fit_layers(probe, rows, samples.fit, samples.held_out)
    before = reference.measure(rows, "without refit")
    about = (samples.text, len(samples.fit), len(samples.fit[0].tokens))
    for share in SHARES if fitted else ():
        weights = {layer: matrices.between(share) for layer, matrices in fitted.items()}
        with replaced(probe, weights):
            after = reference.measure(rows, "with refit")
        if after.no_worse(before):
            return Refit(weights, RefitReport(share, layers, before, after, *about))
    return Refit({}, RefitReport(0.0, layers, before, before, *about))


def fit_layers(
    probe: Probe, rows: Rows, fit: tuple[Sample, ...], held_out: tuple[Sample, ...]
) -> "tuple[dict[int, Matrices], dict[int, LayerRefit]]":
    """The matrices that help on held-out samples, by layer, and what was found for every layer."""
    import torch

    samples = (*fit, *held_out)
    replay = Replay(probe, torch.stack([sample.tokens for sample in samples]))
    shared = base = replay.states
    chunks = [slice(start, start + replay.batch) for start in range(0, len(samples), replay.batch)]
    loans: list[Loans] = [{} for _ in chunks]
    first, last = min(rows, default=0), max(rows, default=-1)
    found: dict[int, LayerRefit] = {}
    matrices: dict[int, Matrices] = {}
    with progress(last + 1, "refit", unit="layer") as bar, torch.no_grad():
        for layer in range(last + 1):
            if layer == first:
                base = shared.clone()
            if layer in rows:
                work = _LayerFit(probe, replay, rows, layer, samples, len(fit))
                for chunk, loan in zip(chunks, loans, strict=True):
                    base[chunk] = work.add(base[chunk], shared[chunk], dict(loan), chunk)
                matrix, found[layer] = work.solve()
                if matrix is not None:
                    matrices[layer] = matrix
            elif layer > first:
                for chunk in chunks:
                    base[chunk] = replay.run(layer, base[chunk])
            refitted = {layer: matrices[layer].fitted} if layer in matrices else {}
            with replaced(probe, refitted), probe.sharing(rows):
                for chunk, loan in zip(chunks, loans, strict=True):
                    with probe.lending(loan):
                        shared[chunk] = replay.run(layer, shared[chunk])
            bar.update()
    return matrices, found


@dataclass
class _LayerFit:
    """The regression of one layer: sums over fitted and held-out samples, of text and of repetition."""

    probe: Probe
    replay: Replay
    rows: Rows
    layer: int
    samples: tuple[Sample, ...]
    fitted: int
    sums: dict[tuple[bool, bool], Sums] = field(default_factory=dict)
    base_weight: "torch.Tensor | None" = None

    def add(self, base: "torch.Tensor", shared: "torch.Tensor", loan: Loans, chunk: slice) -> "torch.Tensor":
        """Add a chunk's states (B, T, hidden) before the layer; return the base's after it."""
        import torch

        projection = self.probe.output_projections[self.layer]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def take(inputs: "torch.Tensor", output: "torch.Tensor") -> None:
            seen.append((inputs.reshape(*output.shape[:-1], -1).float().cpu(), output.float().cpu()))
            if self.base_weight is None:
                self.base_weight = projection.weight.detach().float().cpu().clone()

        with captured(projection, take):
            after = self.replay.run(self.layer, base)
            with self.probe.sharing(self.rows), self.probe.lending(loan):
                self.replay.run(self.layer, shared)
        (_, wanted), (inputs, output) = seen
        for at, sample in enumerate(self.samples[chunk]):
            key = (chunk.start + at < self.fitted, sample.repetition)
            x, error = inputs[at][sample.scored], (wanted - output)[at][sample.scored]
            self.sums.setdefault(key, Sums()).add(x, error)
        return after

    def solve(self) -> tuple[Matrices | None, LayerRefit]:
        """The matrices, or None where no strength helps on all held-out samples."""
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
        assert self.base_weight is not None
        _, strength, change, left = best
        # The projection holds (output, input); least squares finds (input, output).
        matrices = Matrices(self.base_weight, self.base_weight + change.T)
        return matrices, LayerRefit(strength, left.get(False, 1.0), left.get(True))


@contextmanager
def replaced(probe: Probe, weights: "Mapping[int, torch.Tensor]") -> Iterator[None]:
    """While open, these layers' output projections use these matrices (output, input)."""
    import torch
    from torch.nn import functional

    def hook(matrix: "torch.Tensor") -> Any:
        def apply(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return functional.linear(args[0], matrix.to(output.device, output.dtype), module.bias)

        return apply

    handles = [probe.output_projections[layer].register_forward_hook(hook(matrix)) for layer, matrix in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
