"""How a plan is tried on a base model that runs: attention is changed on its way, and no weight is touched."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Turned = Callable[["torch.Tensor", bool], "torch.Tensor"]
"""Turns keys (B, G, S, D) by their positions, or, if the second is true, back."""

Lent = Callable[[int], "torch.Tensor"]
"""The probabilities (B, H, T, S) of a layer that has run before, of those that a trial names as lenders."""


class Trial:
    """What one treatment changes of the attention of layers; every default leaves it as it is.

    Letters: B sequences, H query heads, G KV groups, T tokens, S tokens seen, D head size.
    """

    lenders: frozenset[int] = frozenset()
    """Layers whose probabilities are asked for by later layers."""

    whole_layers: frozenset[int] = frozenset()
    """Layers whose attention as a whole is changed: `output` is asked for these."""

    def key(self, layer: int, key: "torch.Tensor", turned: Turned) -> "torch.Tensor":
        """Keys (B, G, S, D), turned by position already. turned: turns other keys as the layer does in this pass."""
        return key

    def probabilities(self, layer: int, own: "torch.Tensor", lent: Lent, groups: int) -> "torch.Tensor":
        """Probabilities (B, H, T, S) that weigh the values. own: those that the layer's heads have computed.
        groups: KV groups of the layer."""
        return own

    def value(self, layer: int, value: "torch.Tensor") -> "torch.Tensor":
        """Values (B, G, S, D)."""
        return value

    def output(self, layer: int, states: "torch.Tensor", output: "torch.Tensor") -> "torch.Tensor":
        """What a layer's attention module puts out (B, T, hidden), after its output projection. states: (B, T, hidden),
        what goes into it."""
        return output
