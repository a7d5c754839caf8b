"""Layers with fewer KV groups, tried on a base model that runs: keys and values as they would be read."""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.treatments.merge.bases import Merged
from sa_convert.treatments.merge.learned import learned
from sa_convert.treatments.merge.rules import merged_layers
from sa_convert.treatments.trial import Trial, Turned

if TYPE_CHECKING:
    import torch


class MergeTrial(Trial):
    """parts: by layer, of every KV group that is left. Turning a key multiplies pairs of its numbers, as `Merged`
    does, so that keys need not be turned back."""

    def __init__(self, plan: Plan) -> None:
        self.parts = {layer: learned().merged(layer, groups) for layer, groups in merged_layers(plan).items()}

    def key(self, layer: int, key: "torch.Tensor", turned: Turned) -> "torch.Tensor":
        return in_parts(self.parts[layer], key, Merged.keys) if layer in self.parts else key

    def value(self, layer: int, value: "torch.Tensor") -> "torch.Tensor":
        return in_parts(self.parts[layer], value, Merged.values) if layer in self.parts else value


def in_parts(parts: tuple[Merged, ...], states: "torch.Tensor", made: object) -> "torch.Tensor":
    """Keys or values (B, G, S, D), of which each part makes those of as many KV groups."""
    import torch

    count = states.shape[1] // len(parts)
    found = [made(part, some) for part, some in zip(parts, states.split(count, dim=1), strict=True)]  # type: ignore[operator]
    return torch.cat(found, dim=1)
