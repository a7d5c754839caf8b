"""Which layers may have fewer KV groups, and into how many."""

from collections.abc import Mapping
from typing import Any

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.errors import PlanError

NAME = "merge"

ALONE = 1
"""KV groups of a layer whose plan names no number."""


def refusal(geometry: ModelGeometry, index: int) -> str | None:
    """Why a layer's KV groups cannot become fewer, or None if they can."""
    layer = geometry.layers[index]
    if not layer.heads:
        return "it has no softmax attention"
    if not layer.cached:
        return "it caches nothing, so nothing would be saved"
    if not layer.rotary:
        return "its keys do not turn by position; low_rank makes such keys and values smaller"
    if geometry.merging is not None:
        return geometry.merging
    return "it has one KV group only" if layer.groups == 1 else None


def choices(layer: LayerGeometry) -> list[int]:
    """The numbers of KV groups that a layer can be left with, the largest first."""
    return [number for number in range(layer.groups - 1, 0, -1) if layer.groups % number == 0]


def merged_layers(plan: Plan) -> dict[int, int]:
    """How many KV groups each treated layer of a plan has left."""
    return {index: next(iter(groups.values()))["groups"] for index, groups in plan.groups_of(NAME).items()}


def check_layer(plan: Plan, geometry: ModelGeometry, index: int) -> None:
    """Raise PlanError if a treated layer cannot be as the plan has it."""
    layer, name = geometry.layers[index], plan.label(index)
    reason = refusal(geometry, index)
    if reason is not None:
        raise PlanError(f"Layer {name} cannot have fewer KV groups: {reason}.")
    groups = plan.layers[index]
    told: list[Mapping[str, Any]] = (
        [] if isinstance(groups, str) else [groups.get(at, {}) for at in range(layer.groups)]
    )
    others = sorted({other for one in told for other in one} - {NAME})
    if others:
        raise PlanError(f"Layer {name} cannot be treated by merge and {others[0]} together; choose one of them.")
    numbers = {one[NAME]["groups"] if NAME in one else None for one in told}
    if len(numbers) > 1:
        raise PlanError(f"Layer {name}: merge is done to whole layers; write {name}: merge in the place of KV groups.")
    (number,) = numbers
    if number not in choices(layer):
        known = " or ".join(map(str, reversed(choices(layer))))
        raise PlanError(f"Layer {name} has {layer.groups} KV groups, which merge cannot make {number}; write {known}.")
