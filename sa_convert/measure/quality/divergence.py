"""How far two models say the same: KL divergence and top-1 agreement, though only one of them is in memory at a time.

The reference runs first and its logits wait on disk, one file a sequence, just as the model gave them, so that nothing
is lost by rounding them once more. Each is deleted as soon as it is compared.
"""

from pathlib import Path

import torch

from sa_convert.domain.agreement import Agreement
from sa_convert.errors import CheckpointError, OutputError
from sa_convert.output.disk_space import require_space

ROWS = 64
"""Positions compared at once: 64 of a vocabulary of 256k take 130 MB for each model in float64."""

_LOGITS = "logits"


class KeptLogits:
    """Scored logits of so many sequences, kept in an empty folder. `keep` and `take` both go from first to last."""

    def __init__(self, folder: Path, sequences: int) -> None:
        self._folder = folder
        self._sequences = sequences
        self._kept = self._taken = 0

    def keep(self, logits: torch.Tensor) -> None:
        """Write the logits (N, vocabulary) of the next sequence. Raises OutputError if all will not fit on disk."""
        from safetensors.torch import save_file

        if self._kept == 0:
            needed = logits.nbytes * self._sequences
            require_space(self._folder, needed, f"The logits of {self._sequences} sequences", "fewer --sequences")
        save_file({_LOGITS: logits.contiguous().cpu()}, self._file(self._kept))
        self._kept += 1

    def take(self) -> torch.Tensor:
        """The logits of the next sequence, on the CPU; their file is gone."""
        from safetensors.torch import load_file

        file = self._file(self._taken)
        logits = load_file(file)[_LOGITS]
        file.unlink()
        self._taken += 1
        return logits

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"


class Comparison:
    """Compares a model with a reference whose logits are kept, sequence by sequence in the same order."""

    def __init__(self, reference: KeptLogits) -> None:
        self._reference = reference
        self._kl = 0.0
        self._same = self._tokens = 0

    def add(self, logits: torch.Tensor) -> None:
        """The model's logits (N, vocabulary) of the next sequence, those that the reference has.

        Raises CheckpointError if the models have vocabularies of different sizes.
        """
        reference = self._reference.take()
        if reference.shape != logits.shape:
            raise CheckpointError(
                f"The models have different vocabularies, of {logits.shape[-1]} and {reference.shape[-1]} tokens, so "
                "their predictions cannot be compared: evaluate them one at a time, without --against."
            )
        for expected, got in zip(reference.split(ROWS), logits.split(ROWS), strict=True):
            expected = expected.to(got.device)
            self._kl += kl_divergence(expected, got).sum().item()
            self._same += int((expected.argmax(dim=-1) == got.argmax(dim=-1)).sum())
            self._tokens += len(got)

    @property
    def agreement(self) -> Agreement:
        return Agreement(self._kl / self._tokens, self._same / self._tokens, self._tokens)


class Predictions:
    """The base model's predictions on the first sequences, for a converted model that runs later.

    `keep` and `compare` are called with the scored logits (N, vocabulary) of every sequence, from first to last; those
    beyond `sequences` are passed over. If they do not fit on disk, nothing is compared.
    """

    def __init__(self, folder: Path, sequences: int) -> None:
        self._kept = KeptLogits(folder, sequences)
        self._left = self._compared = sequences
        self._comparison: Comparison | None = Comparison(self._kept)

    def keep(self, logits: torch.Tensor) -> None:
        if self._left and self._comparison is not None:
            self._left -= 1
            try:
                self._kept.keep(logits)
            except OutputError:
                self._comparison = None

    def compare(self, logits: torch.Tensor) -> None:
        if self._compared and self._comparison is not None:
            self._compared -= 1
            self._comparison.add(logits)

    @property
    def agreement(self) -> Agreement | None:
        return self._comparison.agreement if self._comparison is not None else None


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) in nats (T), in float64, from the logits (T, vocabulary) of both.

    A token that the reference holds impossible adds nothing, whatever the model says of it.
    """
    # MPS has no float64.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    p, q = reference.to(wide).log_softmax(dim=-1), logits.to(wide).log_softmax(dim=-1)
    weights = p.exp()
    return torch.where(weights > 0, weights * (p - q), 0.0).sum(dim=-1)
