"""Layers whose attention puts out nothing, in a converted model: what goes around it is all that goes on.

After LLM-Drop (He et al., arXiv 2406.15786).
"""

import torch


class Drop:
    """Layers without attention, in one stack. stack: see `modeling_shared_attention.treat`."""

    divisible = True

    def __init__(self, stack):
        self.layers = frozenset(stack.layers)

    def touches(self, layer):
        return layer in self.layers

    def own_heads(self, layer):
        return ()

    def enter(self, attention):
        """What a module loses and gets that is about to lose its attention."""
        attention.hollow()

    def output(self, attention, states):
        """What comes in the place of attention over states (B, T, hidden), of the same shape."""
        if torch.is_grad_enabled():  # data-parallel training waits for a gradient of the norm before, if only of zero
            return states * 0
        return torch.zeros_like(states)
