"""Ridge regression from sums over tokens, so that no token needs to be kept."""

from dataclasses import dataclass, field

import torch


@dataclass
class Sums:
    """What least squares needs of inputs X (tokens, n) and remaining errors E (tokens, m).

    gram: X'X (n, n); moment: X'E (n, m); energy: the sum of E squared.
    """

    gram: torch.Tensor | float = 0.0
    moment: torch.Tensor | float = 0.0
    energy: float = 0.0
    tokens: int = field(default=0)

    def add(self, inputs: torch.Tensor, errors: torch.Tensor) -> None:
        """inputs (tokens, n), errors (tokens, m), float32."""
        self.gram = self.gram + inputs.T @ inputs
        self.moment = self.moment + inputs.T @ errors
        self.energy += errors.double().square().sum().item()
        self.tokens += len(inputs)

    def remaining(self, change: torch.Tensor) -> float:
        """The squared error left where X times `change` C (n, m) is added, as a part of it: |E - X C|^2 / |E|^2."""
        assert not isinstance(self.gram, float)
        assert not isinstance(self.moment, float)
        change = change.double()
        left = self.energy - 2 * (change * self.moment.double()).sum() + (change * (self.gram.double() @ change)).sum()
        return float(left) / self.energy if self.energy else 0.0


def combine(parts: list[tuple[float, Sums]]) -> Sums:
    """The weighted sum of several."""
    total = Sums()
    for weight, part in parts:
        total.gram = total.gram + weight * part.gram
        total.moment = total.moment + weight * part.moment
        total.energy += weight * part.energy
        total.tokens += part.tokens
    return total


def solve(sums: Sums, strength: float) -> torch.Tensor:
    """The change C (n, m) with the least |E - X C|^2 + s |C|^2, s being `strength` times the mean of X'X's diagonal.

    The error is what a present matrix leaves, so this pulls towards the present matrix.
    """
    assert not isinstance(sums.gram, float)
    assert not isinstance(sums.moment, float)
    gram = sums.gram.double().clone()
    gram.diagonal().add_(strength * gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return torch.linalg.lstsq(gram, sums.moment.double()).solution.float()
    return torch.cholesky_solve(sums.moment.double(), factor).float()
