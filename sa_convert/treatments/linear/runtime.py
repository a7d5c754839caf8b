"""Layers in which one linear map, of what goes into attention, takes its place, in a converted model.

After NBL (Erdogan et al., arXiv 2505.21077).
"""

from torch import nn


class Linear:
    """Layers with a linear map for attention, in one stack. stack: see `modeling_shared_attention.treat`."""

    divisible = True

    def __init__(self, stack):
        self.layers = frozenset(stack.layers)

    def touches(self, layer):
        return layer in self.layers

    def own_heads(self, layer):
        return ()

    def enter(self, attention):
        """What a module loses and gets that is about to lose its attention. Matrices tell how large states are."""
        names = attention.names
        weight = getattr(attention, names.fused or names.query).weight
        size = weight.shape[0 if names.transposed else 1]
        attention.hollow()
        attention.linear = nn.Linear(size, size, dtype=weight.dtype, device=weight.device)

    def output(self, attention, states):
        """What comes in the place of attention over states (B, T, hidden), of the same shape."""
        return attention.linear(states)
