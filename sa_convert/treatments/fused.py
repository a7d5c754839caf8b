"""Where queries, keys and values lie in one fused projection.

Counted in heads, that is in `head_dim` rows. A layer that has lost queries or keys keeps its own queries, its own keys
and all values, in this order, whatever the order of the base was: the code that travels then splits them without moving
any.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sa_convert.domain.geometry import LayerGeometry


@dataclass(frozen=True)
class Places:
    """The place of every query head, and of every KV group's key and value."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]


def places(order: str, layer: LayerGeometry) -> Places:
    """order: see `Family.fused_order`."""
    heads, groups = layer.heads, layer.groups
    if order == "blocks":
        numbers = tuple(range(heads + 2 * groups))
        return Places(numbers[:heads], numbers[heads : heads + groups], numbers[heads + groups :])
    size = layer.group_size
    starts = range(0, groups * (size + 2), size + 2)
    return Places(
        tuple(start + query for start in starts for query in range(size)),
        tuple(start + size for start in starts),
        tuple(start + size + 1 for start in starts),
    )


def kept_places(order: str, layer: LayerGeometry, own_heads: Sequence[int], own_groups: Sequence[int]) -> list[int]:
    """The places that a layer with these queries and keys of its own keeps, in their new order."""
    at = places(order, layer)
    return [*(at.queries[head] for head in own_heads), *(at.keys[group] for group in own_groups), *at.values]


def kept_of_gated(heads: int, own_heads: Sequence[int]) -> list[int]:
    """The places that stay of a query projection that holds a gate beside each head's query: own queries, all gates."""
    return [*(2 * head for head in own_heads), *(2 * head + 1 for head in range(heads))]
