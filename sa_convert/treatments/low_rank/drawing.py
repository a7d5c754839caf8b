"""How low rank is told and drawn: report, card, dry run, `inspect`, and figure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.stacks import layer_names
from sa_convert.domain.treated import Drawing, Inspected, Look, Treated
from sa_convert.treatments.low_rank.rules import NAME, SIDES

PAPER = "https://arxiv.org/abs/2408.05646"

LOOK = Look("low rank", "#4fc3a1", "keys or values cached in fewer numbers", mark="floor")

LETTERS = {"keys": "r", "values": "v"}
"""Before the number of a rank in the figure."""


def treated(plan: Plan, geometry: ModelGeometry) -> Treated:
    """What a plan does by low rank."""
    groups = plan.groups_of(NAME)
    sides = [side for side in SIDES if _ranks(plan, side)] or ["keys"]
    what, parts, rows, table, turned = " and ".join(sides), [], [], [], False
    for side in sides:
        found = _ranks(plan, side)
        ranks = Counter(found.values())
        count = f"{sum(ranks.values())} of {geometry.total_groups} KV groups"
        told = ", ".join(f"{ranks[rank]} in {rank} numbers" for rank in sorted(ranks)) or "none"
        inside = len({layer for layer, _ in found})
        start = f"{side} of " if len(sides) > 1 else ""
        parts.append(f"{start}{count}, in {inside} {'layer' if inside == 1 else 'layers'}: {told}")
        rows += [(f"KV groups with low-rank {side}", count), (f"of which cache a {side.removesuffix('s')}", told)]
        for rank in sorted(ranks):
            layers = sorted({layer for (layer, _), one in found.items() if one == rank})
            table.append(
                f"| {rank} of a {side.removesuffix('s')} | {ranks[rank]} | {layer_names(plan.stacks, layers)} |"
            )
        turned |= side == "keys" and any(geometry.layers[layer].rotary for layer, _ in found)
    count = f"{sum(map(len, groups.values()))} of {geometry.total_groups} KV groups"
    remark = "Low-rank keys that turn by position are expanded whenever they are used: they save memory, and cost time."
    return Treated(
        name=NAME,
        label=f"Low-rank {what}",
        summary="; ".join(parts),
        rows=tuple(rows),
        lead=(
            f"{count} cache their {what} in fewer numbers{', before keys are turned by position' if turned else ''} "
            f"(after [Eigen Attention]({PAPER}))"
        ),
        heading=f"What has low-rank {what}",
        caption="What is done to which KV groups",
        table=("| numbers that are cached | KV groups | in layers |", "|---|---|---|", *table),
        remarks=(remark,) if turned or not groups else (),
    )


def _ranks(plan: Plan, side: str) -> Mapping[tuple[int, int], int]:
    """Rank by layer and KV group."""
    groups = plan.groups_of(NAME)
    return {
        (layer, group): told[side] for layer, each in groups.items() for group, told in each.items() if side in told
    }


def drawing(plan: Plan, geometry: ModelGeometry) -> Drawing:
    """What the figure shows of low rank: the ranks."""
    looks = {
        (layer, group): replace(LOOK, label=" ".join(f"{LETTERS[side]}{told[side]}" for side in SIDES if side in told))
        for layer, groups in plan.groups_of(NAME).items()
        for group, told in groups.items()
    }
    notes = {"keys": "r32: 32 numbers of a key are cached", "values": "v32: 32 numbers of a value"}
    shown = [notes[side] for side in SIDES if _ranks(plan, side)]
    return Drawing(
        title=f"{treated(plan, geometry).label}: {len(looks)} of {geometry.total_groups} KV groups",
        note="; ".join(shown) or notes["keys"],
        looks=looks,
        legend=(LOOK.state,),
    )


def inspected(geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
    """What `inspect` tells of a converted model's low-rank keys and values."""
    if geometry is None or not plan or not plan.groups_of(NAME):
        return Inspected(reason)
    found = treated(plan, geometry)
    return Inspected(reason, rows=((found.label, found.summary),))
