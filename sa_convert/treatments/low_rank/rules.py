"""Which layers may have low-rank keys or values, and where their bases go."""

from typing import Literal

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.families.family import Modules

NAME = "low_rank"

Side = Literal["keys", "values"]
"""Of what a KV group caches."""

SIDES: tuple[Side, ...] = ("keys", "values")


def refusal(geometry: ModelGeometry, index: int, side: Side = "keys") -> str | None:
    """Why a layer's KV groups cannot have low-rank keys, or values, or None if they can."""
    layer = geometry.layers[index]
    if not layer.heads:
        return "it has no softmax attention"
    if not layer.cached:
        return "it caches nothing"
    if layer.stack.endswith("cross"):
        return f"it attends to what an encoder has read, whose {side} are cached as they are"
    if side == "values":
        return geometry.weighing
    return geometry.turning if layer.rotary else None


def is_short(modules: Modules, layer: LayerGeometry) -> bool:
    """Whether the projection of keys that are turned by position has a row for each number that is cached; as the
    runtime has it."""
    plain = not (modules.fused or modules.transposed or modules.key_norm or modules.value_limit)
    return layer.rotary and plain


def is_folded(modules: Modules, layer: LayerGeometry) -> bool:
    """Whether a basis of keys goes into the projections of queries and keys: they are not turned, and nothing else is
    done to them. As `is_linear` of the runtime has it."""
    norms = modules.query_norm or modules.key_norm
    return not (layer.rotary or norms or modules.value_limit or modules.gate)
