"""How far a base model with a plan, or with other weights, is from itself as it was: loss and divergence."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch

from sa_convert.console.progress import progress
from sa_convert.domain.calibrated import Distance
from sa_convert.domain.plan import Plan
from sa_convert.models.processes import in_share, merged, shared
from sa_convert.observe.probe import Probe
from sa_convert.observe.sequences import Sample

MOST_BYTES = 1 << 30


class Reference:
    """The base model's predictions of some samples, to measure others against.

    They are kept as log-probabilities: 4 bytes for each scored token and each token of the vocabulary, or 2 if that
    would be more than MOST_BYTES. `probe` must run the unchanged base model when this is made. Several processes
    share the samples, and all get what was measured.
    """

    def __init__(self, probe: Probe, samples: Sequence[Sample], description: str = "base model") -> None:
        self.probe, self.samples = probe, samples
        self._base: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        with progress(in_share(samples), description, unit="seq") as bar:
            for _, sample in shared(samples):
                chances, labels = self._chances(sample, Plan())
                self._labels.append(labels)
                self._base.append(chances if 4 * chances.numel() * len(samples) < MOST_BYTES else chances.half())
                bar.update()
        self.base = self._distance(iter(self._base))

    def measure(self, plan: Plan, description: str = "measuring") -> Distance:
        """The model as it is now, under a plan."""
        with progress(in_share(self.samples), description, unit="seq") as bar:

            def chances() -> Iterable[torch.Tensor]:
                for _, sample in shared(self.samples):
                    yield self._chances(sample, plan)[0]
                    bar.update()

            return self._distance(chances())

    def _chances(self, sample: Sample, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (scored tokens, vocabulary), float32, and the labels (scored tokens), on the CPU."""
        blocks = self.probe.in_blocks() if sample.kept else nullcontext()
        with torch.inference_mode(), self.probe.trying(plan), blocks:
            inputs = sample.inputs(self.probe.model)
            ((predictions, labels),) = inputs.scored_logits(inputs.logits(self.probe.model))
            return torch.log_softmax(predictions.float(), dim=-1).cpu(), labels.cpu()

    def _distance(self, predictions: Iterable[torch.Tensor]) -> Distance:
        found: dict[int, tuple[float, float, int]] = {}
        for (number, _), labels, base, chances in zip(
            shared(self.samples), self._labels, self._base, predictions, strict=True
        ):
            chances = chances.float()
            loss = -chances.gather(1, labels[:, None]).double().mean().item()
            certain = base.float()
            divergence = (certain.exp() * (certain - chances)).sum(-1).double().mean().item()
            found[number] = loss, divergence, len(labels)
        losses: list[float] = []
        copying: list[float] = []
        sums = {False: [0.0, 0.0, 0.0], True: [0.0, 0.0, 0.0]}  # loss, divergence, tokens; True: of repetition
        every = merged(found)
        for number, sample in enumerate(self.samples):
            loss, divergence, tokens = every[number]
            (copying if sample.repetition else losses).append(loss)
            kind = sums[sample.repetition]
            for at, value in enumerate((loss * tokens, divergence * tokens, float(tokens))):
                kind[at] += value
        text, repetition = sums[False], sums[True]
        return Distance(
            text[0] / max(text[2], 1),
            text[1] / max(text[2], 1),
            repetition[1] / repetition[2] if repetition[2] else None,
            tuple(losses),
            tuple(copying),
        )
