"""How alike the attention weights of a model's layers are: the observation that Shared Attention started from.

Similarity of two layers (arXiv 2407.12866): the cosine between the weight matrices of their heads, those of the same
index, averaged over heads and sequences. Isotropy of a layer: the mean of its similarity to all other layers; so the
authors use the word ("attention weight isotropy: high similarity in attention distributions across layers", abstract of
the journal version, Neurocomputing 648, 2025, 130587). It is not the isotropy of embeddings (Mu and Viswanath, 2018).
Variance of a layer: that of the weights which a token gives to itself and the tokens before it, averaged over tokens
and heads; attention spread evenly has none. It falls with the length of the sequences.

Heads are not aligned across layers, so there is a second matrix: for each layer (row), the cosine between its heads and
their best-matching heads in another layer (column), averaged over heads.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sa_convert.calibrate.finite import not_finite
from sa_convert.calibrate.probe import Probe, Seen
from sa_convert.calibrate.sequences import Sample
from sa_convert.data.analysis import AttentionStatistics
from sa_convert.data.units import Units
from sa_convert.errors import DataError
from sa_convert.progress import progress
from sa_convert.run.device import input_device

if TYPE_CHECKING:
    import torch


def attention_statistics(
    probe: Probe, units: Units, samples: Sequence[Sample], description: str = "similarity of layers"
) -> AttentionStatistics:
    """Over the samples of text; random repetition is left out. Weights of one sequence are in memory at a time.

    samples: of one length. Raises DataError where none of them is text, CheckpointError where weights are not finite.
    """
    import torch

    text = [sample for sample in samples if not sample.repetition]
    if not text:
        raise DataError("Comparing the attention of layers needs at least one sequence of text; give more sequences.")
    length, heads = len(text[0].tokens), units.offsets[-1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    weights = torch.empty(heads, int(seen.sum()))  # (J, pairs of tokens): all that may differ from 0
    cosines = torch.zeros(heads, heads, dtype=torch.float64)
    variance = torch.zeros(len(units.geometry.layers), dtype=torch.float64)

    def observe(layer: Seen) -> None:
        own = layer.weights[0].detach().to("cpu", torch.float32)
        weights[units.offsets[layer.layer] : units.offsets[layer.layer + 1]] = own[:, seen]
        variance[layer.layer] += float(_variance(own, seen))

    with progress(len(text), description, unit="seq") as bar, torch.no_grad(), probe.observing(observe):
        for sample in text:
            probe.model(input_ids=sample.tokens[None].to(input_device(probe.model)), use_cache=False)
            weights.div_(weights.norm(dim=1, keepdim=True).clamp_min_(1e-30))
            cosines += weights @ weights.T
            bar.update()
    if not bool(torch.isfinite(cosines.sum() + variance.sum())):
        raise not_finite(probe.model)
    similarity, matched = _by_layer(cosines / len(text), units)
    return AttentionStatistics(
        similarity, matched, tuple((variance / len(text)).tolist()), _isotropy(similarity), len(text)
    )


def _variance(weights: "torch.Tensor", seen: "torch.Tensor") -> "torch.Tensor":
    """Scalar, of weights (H, T, T): the variance over the tokens seen, averaged over tokens and heads."""
    count = seen.sum(-1)
    mean = weights.sum(-1) / count
    return (weights.square().sum(-1) / count - mean.square()).double().mean()


def _by_layer(
    cosines: "torch.Tensor", units: Units
) -> tuple[tuple[tuple[float | None, ...], ...], tuple[tuple[float | None, ...], ...]]:
    """(L, L) twice, from (J, J): same index, and best match."""
    same: list[tuple[float | None, ...]] = []
    best: list[tuple[float | None, ...]] = []
    for row in _slices(units):
        blocks = [cosines[row, column] for column in _slices(units)]
        same.append(tuple(float(b.diagonal().mean()) if b.shape[0] == b.shape[1] else None for b in blocks))
        best.append(tuple(float(b.max(dim=1).values.mean()) for b in blocks))
    return tuple(same), tuple(best)


def _slices(units: Units) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(units.offsets, units.offsets[1:], strict=False)]


def _isotropy(similarity: tuple[tuple[float | None, ...], ...]) -> tuple[float | None, ...]:
    found: list[float | None] = []
    for layer, row in enumerate(similarity):
        others = [value for other, value in enumerate(row) if other != layer and value is not None]
        found.append(sum(others) / len(others) if others else None)
    return tuple(found)
