"""How fewer KV groups are told and drawn: report, card, dry run, `inspect`, and figure."""

from dataclasses import replace

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.stacks import layer_names
from sa_convert.domain.treated import Drawing, Inspected, Look, Treated
from sa_convert.treatments.merge.rules import merged_layers

LOOK = Look("merge", "#0072b2", "KV groups of the layer made fewer", ink="white", mark="roof")


def treated(plan: Plan, geometry: ModelGeometry) -> Treated:
    """What a plan does by merging."""
    merged, total = merged_layers(plan), sum(bool(layer.heads) for layer in geometry.layers)
    kinds: dict[tuple[int, int], list[int]] = {}
    for index, left in merged.items():
        kinds.setdefault((geometry.layers[index].groups, left), []).append(index)
    names = "; ".join(f"{layer_names(plan.stacks, layers)} ({left} of {of})" for (of, left), layers in kinds.items())
    count = f"{len(merged)} of {total} layers {'has' if len(merged) == 1 else 'have'} fewer KV groups"
    table = (f"| {layer_names(plan.stacks, layers)} | {of} | {left} |" for (of, left), layers in kinds.items())
    return Treated(
        name="merge",
        label="Merge",
        summary=f"{count}: {names or 'none'}",
        rows=(("layers with fewer KV groups", names or "none"),),
        lead=f"{count}, which more query heads read",
        heading="Layers with fewer KV groups",
        caption="Which layers have fewer KV groups",
        table=("| layers | KV groups in the base | left |", "|---|---|---|", *table),
    )


def drawing(plan: Plan, geometry: ModelGeometry) -> Drawing:
    """What the figure shows: how many KV groups a layer has left."""
    merged = merged_layers(plan)
    looks = {
        (index, group): replace(LOOK, label=f"{left}/{geometry.layers[index].groups}")
        for index, left in merged.items()
        for group in range(geometry.layers[index].groups)
    }
    plural = "layer" if len(merged) == 1 else "layers"
    title = f"{len(merged)} {plural} of {len(geometry.layers)} with fewer KV groups"
    return Drawing(title=title, note="1/3: one of three KV groups is left", looks=looks, legend=(LOOK.state,))


def inspected(geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
    """What `inspect` tells of a converted model's fewer KV groups."""
    if geometry is None or not plan or not merged_layers(plan):
        return Inspected(reason)
    (row,) = treated(plan, geometry).rows
    return Inspected(reason, rows=((row[0].capitalize().replace("kv", "KV"), row[1]),))
