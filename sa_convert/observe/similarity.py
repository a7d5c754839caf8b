"""How alike the attention probabilities of a model's layers are: the observation that Shared Attention started from.

Similarity of two layers (arXiv 2407.12866): the cosine between the matrices of probabilities of their heads, those of
the same index, averaged over heads and sequences.

Isotropy of a layer: the mean of its similarity to all other layers. So the authors use the word ("attention weight
isotropy: high similarity in attention distributions across layers", abstract of the journal version, Neurocomputing
648, 2025, 130587). It is not the isotropy of embeddings (Mu and Viswanath, 2018).

Variance of a layer: that of the probabilities which a token gives to the tokens that it may see, averaged over tokens
and heads. It may see itself and those before it; in an encoder and in cross-attention, all. Attention spread evenly has
none. It falls with the length of the sequences.

Layers of different stacks of an encoder-decoder attend to other pairs of tokens, and are not compared.

Heads are not aligned across layers, so there is a second matrix: for each layer (row), the cosine between its heads and
their best-matching heads in another layer (column), averaged over heads.
"""

from collections.abc import Sequence

import torch

from sa_convert.console.progress import progress
from sa_convert.domain.analysis import AttentionStatistics
from sa_convert.domain.units import Units
from sa_convert.errors import DataError
from sa_convert.models.processes import in_share, shared, summed
from sa_convert.observe.finite import not_finite
from sa_convert.observe.probe import Probe, Seen
from sa_convert.observe.sequences import Sample


def attention_statistics(
    probe: Probe, units: Units, samples: Sequence[Sample], description: str = "similarity of layers"
) -> AttentionStatistics:
    """Over the samples of text; random repetition is left out. Probabilities of one sequence are in memory at a time.
    Several processes share the samples.

    samples: of one length. Raises DataError if none of them is text, CheckpointError if probabilities are not finite.
    """
    text = [sample for sample in samples if not sample.repetition]
    if not text:
        raise DataError("Comparing the attention of layers needs at least one sequence of text; give more sequences.")
    heads, layers = units.offsets[-1], units.geometry.layers
    seen: dict[int, torch.Tensor] = {}  # by layer (T, T) bool, the pairs of tokens that may differ from 0
    unit: dict[int, torch.Tensor] = {}  # by layer (H, pairs), probabilities of norm 1
    cosines = torch.full((heads, heads), torch.nan, dtype=torch.float64)
    variance = torch.zeros(len(layers), dtype=torch.float64)
    places = _slices(units)

    def observe(layer: Seen) -> None:
        own = layer.probabilities[0].detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(own.sum())):
            raise not_finite(probe.model)
        pairs = seen.setdefault(layer.layer, _pairs(own))
        chosen = own[:, pairs]
        unit[layer.layer] = chosen.div_(chosen.norm(dim=1, keepdim=True).clamp_min_(1e-30))
        variance[layer.layer] += float(_variance(own, pairs))

    seen_before = False
    with progress(in_share(text), description, unit="seq") as bar, torch.no_grad(), probe.observing(observe):
        for _, sample in shared(text):
            probe.model(**sample.inputs(probe.model).kwargs)
            for row, one in unit.items():
                for column, other in unit.items():
                    if column <= row and layers[row].stack == layers[column].stack:
                        block = (one @ other.T).double()
                        if seen_before:
                            block += cosines[places[row], places[column]]
                        cosines[places[row], places[column]] = block
                        cosines[places[column], places[row]] = block.T
            seen_before = True
            bar.update()
    # Blocks that are not compared are nan in every process that has seen a sequence.
    sums = summed({"cosines": cosines, "variance": variance} if seen_before else {})
    cosines, variance = sums["cosines"], sums["variance"]
    similarity, matched = _by_layer(cosines / len(text), units)
    variances = [value if layer.heads else None for value, layer in zip(variance.tolist(), layers, strict=True)]
    mean = tuple(None if value is None else value / len(text) for value in variances)
    return AttentionStatistics(similarity, matched, mean, _isotropy(similarity), len(text))


def _pairs(attention: torch.Tensor) -> torch.Tensor:
    """(T, T) bool: the pairs of tokens of probabilities (H, T, T): the causal ones, unless one sees later ones."""
    pairs = torch.ones(attention.shape[1:], dtype=torch.bool)
    causal = attention.shape[1] == attention.shape[2] and not bool(attention.triu(1).any())
    return pairs.tril() if causal else pairs


def _variance(attention: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Scalar, of probabilities (H, T, T): the variance over the tokens seen, averaged over tokens and heads."""
    count = seen.sum(-1)
    mean = attention.sum(-1) / count
    return (attention.square().sum(-1) / count - mean.square()).double().mean()


def _by_layer(
    cosines: torch.Tensor, units: Units
) -> tuple[tuple[tuple[float | None, ...], ...], tuple[tuple[float | None, ...], ...]]:
    """(L, L) twice, from (J, J): same index, and best match. None for layers that are not compared."""
    same: list[tuple[float | None, ...]] = []
    best: list[tuple[float | None, ...]] = []
    for row in _slices(units):
        blocks = [cosines[row, column] for column in _slices(units)]
        known = [block.numel() > 0 and not bool(block.isnan().any()) for block in blocks]
        pairs = list(zip(blocks, known, strict=True))
        same.append(tuple(float(b.diagonal().mean()) if ok and b.shape[0] == b.shape[1] else None for b, ok in pairs))
        best.append(tuple(float(b.max(dim=1).values.mean()) if ok else None for b, ok in pairs))
    return tuple(same), tuple(best)


def _slices(units: Units) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(units.offsets, units.offsets[1:], strict=False)]


def _isotropy(similarity: tuple[tuple[float | None, ...], ...]) -> tuple[float | None, ...]:
    means: list[float | None] = []
    for layer, row in enumerate(similarity):
        others = [value for other, value in enumerate(row) if other != layer and value is not None]
        means.append(sum(others) / len(others) if others else None)
    return tuple(means)
