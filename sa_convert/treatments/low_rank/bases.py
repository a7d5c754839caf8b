"""Bases of keys and values: the r dimensions of a KV group in which they lose least.

Let k be a key before it is turned by position, m the mean of keys, C their covariance, and M the second moment of the
gradient of the loss at a key. In place of k comes m + P (k - m), P being of rank r. To second order that costs
1/2 trace(M (I - P) C (I - P)'), with M the Fisher information, and least of all for P = S^-1 V V' S, S the root of M
and V the first r eigenvectors of S C S. (Plain PCA of the keys, with M = I, costs six to eight times as much on text.)

As U has orthonormal columns: P = U E, and what is cached is E k; c = m - P m makes up for the mean.

For values, k is what a head puts out, a sum of values v that attention weighs: P v in their place make P k of it. There
m is 0, since nothing would add c to the sums of heads whose probabilities do not sum to 1 (attention sinks).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LEAST = 1e-9
"""Of the largest eigenvalue of M: below it, a direction is taken to matter as much as that."""


@dataclass(frozen=True)
class Basis:
    """basis: (r, D), orthonormal rows U'. encoder: (r, D), E. offset: (D,), c."""

    basis: "torch.Tensor"
    encoder: "torch.Tensor"
    offset: "torch.Tensor"

    def reduced(self, keys: "torch.Tensor") -> "torch.Tensor":
        """Keys (..., D), not turned, as they come out of a cache."""
        basis, encoder, offset = (part.to(keys) for part in (self.basis, self.encoder, self.offset))
        return keys @ encoder.T @ basis + offset


class GroupMoments:
    """Of one KV group, sums over tokens: of keys (or outputs of heads), their squares, and squares of gradients. D is
    the head size."""

    def __init__(self, size: int) -> None:
        import torch

        self.weight = 0.0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.square = torch.zeros(size, size, dtype=torch.float64)
        self.fisher = torch.zeros(size, size, dtype=torch.float64)

    def add(self, keys: "torch.Tensor", gradients: "torch.Tensor", weight: float) -> None:
        """keys, gradients: (T, D), before they are turned."""
        self.weight += weight * len(keys)
        self.mean += keys.sum(0).double() * weight
        self.square += (keys.T @ keys).double() * weight
        self.fisher += (gradients.T @ gradients).double() * weight

    def basis(self, rank: int, about_mean: bool = True) -> Basis:
        """The best basis of this rank. Of keys that never change, or never matter, any will do. about_mean: or about 0,
        so that there is no offset."""
        import torch

        mean = self.mean / max(self.weight, 1e-30) if about_mean else torch.zeros_like(self.mean)
        covariance = self.square / max(self.weight, 1e-30) - mean[:, None] * mean
        values, vectors = torch.linalg.eigh(self.fisher)
        values = values.clamp(min=max(float(values.max()) * _LEAST, 1e-30)).sqrt()
        root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
        _, found = torch.linalg.eigh(root @ covariance @ root)
        first = found[:, -rank:]
        basis, upper = torch.linalg.qr(inverse @ first)  # (D, r), (r, r)
        encoder = upper @ first.T @ root
        offset = mean - basis @ (encoder @ mean)
        return Basis(basis.T.contiguous().float(), encoder.float(), offset.float())
