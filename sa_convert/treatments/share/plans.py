"""A sharing map as the part of a plan that it is, and back; and as recipes have it."""

from collections.abc import Sequence
from typing import Any

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.plan import GroupPlan, Plan
from sa_convert.domain.stacks import in_stack, layer_of
from sa_convert.domain.units import Unit
from sa_convert.treatments.share.sharing_map import SharingMap, Source

NAME = "share"


def plan_of(sharing: SharingMap, geometry: ModelGeometry) -> Plan:
    """The plan that a map is, which fits the model. KV groups all of whose heads own their attention are left out."""
    layers = {}
    for index, row in sharing.layers.items():
        layer = geometry.layers[index]
        groups = {group: [row[head] for head in layer.heads_of(group)] for group in range(layer.groups)}
        layers[index] = {
            group: {NAME: [source and [in_stack(geometry.stacks, source[0]).number, source[1]] for source in sources]}
            for group, sources in groups.items()
            if any(sources)
        }
    return Plan(layers, geometry.stacks)


def map_of(plan: Plan, geometry: ModelGeometry) -> SharingMap:
    """The map of a plan whose arguments fit the model's layers, KV groups and heads."""
    rows: dict[int, list[Source | None]] = {}
    for index, groups in plan.groups_of(NAME).items():
        layer, stack = geometry.layers[index], in_stack(geometry.stacks, index).stack
        row = rows[index] = [None] * layer.heads
        for group, sources in groups.items():
            for head, source in zip(layer.heads_of(group), sources, strict=True):
                row[head] = source and (layer_of(geometry.stacks, stack, source[0]), source[1])
    return SharingMap({index: tuple(row) for index, row in rows.items()}, geometry.stacks)


def plan_of_unit(unit: Unit, sources: Sequence[Source], geometry: ModelGeometry) -> dict[int, GroupPlan]:
    """The plan of a unit's KV groups, of whose heads each has one of the sources."""
    told = [[in_stack(geometry.stacks, layer).number, head] for layer, head in sources]
    size = geometry.layers[unit.layer].group_size
    return {group: {NAME: told[at * size : (at + 1) * size]} for at, group in enumerate(unit.groups)}


def recipe_of(sharing: SharingMap) -> dict[str, Any]:
    """The key of a recipe that spells the map out."""
    from sa_convert.domain.recipe import Sharing

    heads = {label: tuple(source and tuple(source) for source in row) for label, row in sharing.to_json().items()}
    rows = {int(label) if label.isdigit() else label: row for label, row in heads.items()}
    return {"sharing": Sharing.model_construct(map=rows)}
