"""How low-rank keys are told and drawn: report, card, dry run, `inspect`, and figure."""

from collections import Counter
from dataclasses import replace

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.stacks import layer_names
from sa_convert.domain.treated import Drawing, Inspected, Look, Treated

NAME = "low_rank"
PAPER = "https://arxiv.org/abs/2408.05646"

LOOK = Look("low rank", "#4fc3a1", "keys cached in fewer numbers", mark="floor")


def treated(plan: Plan, geometry: ModelGeometry) -> Treated:
    """What a plan does by low-rank keys."""
    groups = plan.groups_of(NAME)
    ranks = Counter(told["keys"] for layer in groups.values() for told in layer.values())
    count = f"{sum(ranks.values())} of {geometry.total_groups} KV groups"
    told = ", ".join(f"{ranks[rank]} in {rank} numbers" for rank in sorted(ranks)) or "none"
    layers = {
        rank: [layer for layer, of_layer in groups.items() if any(each["keys"] == rank for each in of_layer.values())]
        for rank in sorted(ranks)
    }
    table = [f"| {rank} | {ranks[rank]} | {layer_names(plan.stacks, layers[rank])} |" for rank in layers]
    return Treated(
        name=NAME,
        label="Low-rank keys",
        summary=f"{count}, in {len(groups)} {'layer' if len(groups) == 1 else 'layers'}: {told}",
        rows=(("KV groups with low-rank keys", count), ("of which cache a key", told)),
        lead=(
            f"{count} cache their keys in fewer numbers, before they are turned by position (after "
            f"[Eigen Attention]({PAPER}))"
        ),
        heading="What has low-rank keys",
        caption="What is done to which KV groups",
        table=("| numbers of a key that are cached | KV groups | in layers |", "|---|---|---|", *table),
        remarks=("Low-rank keys are expanded whenever they are used: they save memory, and cost time.",),
    )


def drawing(plan: Plan, geometry: ModelGeometry) -> Drawing:
    """What the figure shows of low-rank keys: their rank."""
    looks = {
        (layer, group): replace(LOOK, label=f"r{told['keys']}")
        for layer, groups in plan.groups_of(NAME).items()
        for group, told in groups.items()
    }
    return Drawing(
        title=f"Low-rank keys: {len(looks)} of {geometry.total_groups} KV groups",
        note="r32: 32 numbers of a key are cached",
        looks=looks,
        legend=(LOOK.state,),
    )


def inspected(geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
    """What `inspect` tells of a converted model's low-rank keys."""
    if geometry is None or not plan or not plan.groups_of(NAME):
        return Inspected(reason)
    return Inspected(reason, rows=(("Low-rank keys", treated(plan, geometry).summary),))
