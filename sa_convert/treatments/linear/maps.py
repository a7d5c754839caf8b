"""The linear map that comes nearest to what an attention block does, by ridge regression from sums over tokens.

After NBL (Erdogan et al., arXiv 2505.21077): its linear minimum mean square error estimate is this, without the ridge.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of the ridge, relative to the mean square of an input; that with the least error on held-out samples is taken."""


@dataclass(frozen=True)
class Affine:
    """x -> weight x + bias. weight: (hidden, hidden), as a linear module holds it; bias: (hidden,). Both float32."""

    weight: "torch.Tensor"
    bias: "torch.Tensor"

    def of(self, states: "torch.Tensor") -> "torch.Tensor":
        """States (..., hidden), mapped, in their own dtype."""
        from torch.nn import functional

        return functional.linear(states.float(), self.weight.to(states.device), self.bias.to(states.device)).to(states)


class Moments:
    """Sums over tokens of inputs X (tokens, n) and outputs Y (tokens, m): X'X, X'Y and the square of Y. The last input
    is the constant 1."""

    def __init__(self) -> None:
        self.gram: torch.Tensor | float = 0.0
        self.cross: torch.Tensor | float = 0.0
        self.square = 0.0

    def add(self, states: "torch.Tensor", output: "torch.Tensor", weight: float) -> None:
        """states, output: (tokens, hidden)."""
        import torch

        inputs = torch.cat([states.float(), states.new_ones(len(states), 1, dtype=torch.float32)], dim=1)
        output = output.float()
        self.gram = self.gram + weight * (inputs.T @ inputs).double().cpu()
        self.cross = self.cross + weight * (inputs.T @ output).double().cpu()
        self.square += weight * output.double().square().sum().item()

    def solve(self, strength: float) -> "torch.Tensor":
        """(n, m) with the least squared error plus a ridge, which does not pull on the constant."""
        import torch

        assert isinstance(self.gram, torch.Tensor)
        gram = self.gram.clone()
        diagonal = gram.diagonal()
        diagonal[:-1] += max(strength * float(diagonal[:-1].mean()), 1e-30)
        return torch.linalg.solve(gram, self.cross)

    def error(self, solution: "torch.Tensor") -> float:
        """The squared error as a part of the square of Y."""
        import torch

        assert isinstance(self.gram, torch.Tensor)
        left = self.square - 2 * (solution * self.cross).sum() + (solution * (self.gram @ solution)).sum()
        return float(left) / max(self.square, 1e-30)


def fitted(fit: Moments, held_out: Moments) -> Affine:
    """The map of the strength that does best on held-out samples."""
    best = min((fit.solve(strength) for strength in STRENGTHS), key=held_out.error).float()
    return Affine(best[:-1].T.contiguous(), best[-1].contiguous())
