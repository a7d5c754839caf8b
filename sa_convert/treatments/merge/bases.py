"""The keys and values that several KV groups share, so that it costs least of those that need no training.

Let x be what goes into a layer, and a 1 at its end for biases.

Keys. Under rotary positions two numbers of a key turn together, by the same angle in every KV group: they are one
complex number, and turning multiplies it. So of one cached key c, pair by pair, KV group g may have the key a[g] c, and
its queries q take conj(a[g]) q of c for the same scores. The c that loses least is the leading eigenvector of the
second moments of the pair over KV groups (complex), each weighted by the root of the mean square of its queries:

    c = sum_g in[g] k[g]        k[g] becomes out[g] c        in[g] out[g] summed up is 1

Values. Head h puts O[h] v out for a value v of its KV group g, O[h] being its columns of the output projection. Of D
cached numbers z = E v of all values side by side, it may have U[g] z. O reads them by a matrix for each head, so this
is as general as it gets. With M the sum of O'O over heads, and C the second moment of values, U E loses least if it is
S^-1 F F' S, S being the root of M and F the first D eigenvectors of S C S.

Query heads and their softmax stay, and so does the family's code. Grouped-query attention (Ainslie et al., arXiv
2305.13245) makes its KV groups of the means of keys and of values, and trains afterwards; this needs no training.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LEAST = 1e-9
"""Of the largest mean square of queries, and of the largest eigenvalue: below it, all count as much as that."""


@dataclass(frozen=True)
class Merged:
    """Of the KV groups g that become one. D is the size of a value, P the pairs of a key. float64.

    key_in, key_out: (g, P), complex. value_in: (D, g * D), E. value_out: (g * D, D), U.
    """

    key_in: "torch.Tensor"
    key_out: "torch.Tensor"
    value_in: "torch.Tensor"
    value_out: "torch.Tensor"

    def keys(self, keys: "torch.Tensor") -> "torch.Tensor":
        """Keys (B, g, S, D), turned or not, as the KV groups have them afterwards."""
        pairs = as_pairs(keys.double(), -1)  # (B, g, S, P)
        one = (pairs * self.key_in[:, None].to(pairs.device)).sum(1, keepdim=True)
        return as_numbers(one * self.key_out[:, None].to(pairs.device), -1).to(keys.dtype)

    def values(self, values: "torch.Tensor") -> "torch.Tensor":
        """Values (B, g, S, D), likewise."""
        side = values.transpose(1, 2).flatten(2).double()  # (B, S, g * D)
        one = side @ self.value_in.T.to(side.device)
        made = (one @ self.value_out.T.to(side.device)).unflatten(-1, (values.shape[1], -1))
        return made.transpose(1, 2).to(values.dtype)


def as_pairs(states: "torch.Tensor", axis: int) -> "torch.Tensor":
    """Heads along an axis -> complex: number i of the first half with number i of the second."""
    import torch

    first, second = states.chunk(2, dim=axis)
    return torch.complex(first.contiguous(), second.contiguous())


def as_numbers(pairs: "torch.Tensor", axis: int) -> "torch.Tensor":
    """The other way round."""
    import torch

    return torch.cat([pairs.real, pairs.imag], dim=axis)


def merged(
    queries: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    outputs: "torch.Tensor",
    *,
    moment: "torch.Tensor",
) -> Merged:
    """queries: (g, heads of one, D, n); keys, values: (g, D, n), of the same KV groups: rows of projections, biases
    being the last of n columns. outputs: (g, heads of one, hidden, D). moment: (n, n), second moment of inputs."""
    key_in, key_out = _of_keys(queries.double(), keys.double(), moment)
    value_in, value_out = _of_values(values.double(), outputs.double(), moment)
    return Merged(key_in, key_out, value_in, value_out)


def _of_keys(
    queries: "torch.Tensor", keys: "torch.Tensor", moment: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    asked, pairs, among = as_pairs(queries, -2), as_pairs(keys, -2), moment.to(torch.complex128)
    power = torch.einsum("ghpn,nm,ghpm->gp", asked, among, asked.conj()).real / asked.shape[1]
    weight = power.clamp(min=max(float(power.max()) * _LEAST, 1e-30)).sqrt()  # (g, P)
    weighted = weight[..., None] * pairs
    between = torch.einsum("gpn,nm,hpm->pgh", weighted, among, weighted.conj())
    leading = torch.linalg.eigh(between)[1][..., -1].T  # (g, P)
    key_in, key_out = leading.conj() * weight, leading / weight
    size = key_out.abs().square().mean(0).sqrt()  # so that keys and queries stay as large as they were
    return key_in * size, key_out / size


def _of_values(
    values: "torch.Tensor", outputs: "torch.Tensor", moment: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    size, every = values.shape[1], values.flatten(0, 1)  # (g * D, n)
    metric = torch.block_diag(*torch.einsum("ghov,ghow->gvw", outputs, outputs))
    found, vectors = torch.linalg.eigh(metric)
    found = found.clamp(min=max(float(found.max()) * _LEAST, 1e-30)).sqrt()
    root, inverse = (vectors * found) @ vectors.T, (vectors / found) @ vectors.T
    first = torch.linalg.eigh(root @ every @ moment @ every.T @ root)[1][:, -size:]
    # Orthonormal columns, so that values are about as large as they were.
    basis, rest = torch.linalg.qr(inverse @ first)
    return rest @ first.T @ root, basis
