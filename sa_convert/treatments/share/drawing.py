"""How sharing is told and drawn: report, card, dry run, and figure."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.stacks import Stacks, in_stack, layer_label, layer_names
from sa_convert.domain.treated import Drawing, Look, Treated
from sa_convert.treatments.share.sharing_map import SharingMap, Source

PAPER = "https://arxiv.org/abs/2407.12866"

OWN, SOURCE, PARTIAL, BORROWED = "own", "source", "partial", "borrowed"

# Colours that stay apart in every common kind of colour blindness, and in grey (after Okabe and Ito).
LOOKS = {
    SOURCE: Look(SOURCE, "#56b4e9", "own attention, used by later layers"),
    PARTIAL: Look(PARTIAL, "#f5d9a8", "some heads borrow, keys stay"),
    BORROWED: Look(BORROWED, "#c04f00", "all heads borrow, keys removed", ink="white"),
}


def treated(sharing: SharingMap, geometry: ModelGeometry) -> Treated:
    """What a map does to a model."""
    caches = any(layer.cached and layer.heads for layer in geometry.layers)
    return told(sharing, sharing.reused_groups(geometry), geometry.total_groups, caches)


def told(sharing: SharingMap, reused: int, total: int, caches: bool = True) -> Treated:
    """reused: KV groups without keys, of so many in `total`. caches: whether the model caches anything at all."""
    layers = len(sharing.layers)
    summary = f"{reused} of {total} KV groups borrow, in {layers} {'layer' if layers == 1 else 'layers'}"
    whole = [index for index, row in sharing.layers.items() if None not in row]
    partly = [index for index in sharing.layers if index not in whole]
    return Treated(
        name="share",
        label="Sharing",
        summary=summary,
        rows=(
            ("layers that borrow wholly", layer_names(sharing.stacks, whole) or "none"),
            ("layers that borrow partly", layer_names(sharing.stacks, partly) or "none"),
            ("KV groups without keys", f"{reused} of {total}"),
        ),
        section={"sharing": {"layers": sharing.to_json(), "reused_groups": reused, "total_groups": total}},
        lead=(
            "some attention heads borrow the attention probabilities of heads in earlier layers "
            f"([Shared Attention]({PAPER})). {summary}; they have no key projections"
            f"{' and cache no keys' if caches else ''}"
        ),
        heading="What is shared",
        caption="Which KV groups borrow attention, and from which layer",
        table=tuple(_table(sharing)),
        remarks=tuple(_remarks(sharing, caches)),
    )


def _table(sharing: SharingMap) -> Iterator[str]:
    """Which layers borrow from which."""
    yield "| layers | query heads that borrow | source layers |"
    yield "|---|---|---|"
    stacks = sharing.stacks
    rows = [(layer, _heads(row), _sources(row, stacks)) for layer, row in sharing.layers.items()]
    # Layers of a stack that follow each other and share alike are one line.
    indexed = groupby(
        enumerate(rows), lambda item: (in_stack(stacks, item[1][0]).stack, item[1][0] - item[0], item[1][1:])
    )
    for (_, _, (heads, sources)), group in indexed:
        yield f"| {layer_names(stacks, [row[0] for _, row in group])} | {heads} | {sources} |"


def _heads(row: tuple[Source | None, ...]) -> str:
    borrowed = sum(source is not None for source in row)
    return f"all {len(row)}" if borrowed == len(row) else f"{borrowed} of {len(row)}"


def _sources(row: tuple[Source | None, ...], stacks: Stacks) -> str:
    """Source layers, and whether head i uses head i."""
    used = [(head, source) for head, source in enumerate(row) if source is not None]
    layers = ", ".join(layer_label(stacks, layer) for layer in sorted({source[0] for _, source in used}))
    return f"{layers} (same heads)" if all(head == source[1] for head, source in used) else layers


def _remarks(sharing: SharingMap, caches: bool) -> Iterator[str]:
    """Where there is no cache, sharing saves something else."""
    saved = "parameters, and the computation of queries, keys and probabilities"
    if not caches:
        yield f"The model caches nothing: what sharing saves are {saved}."
    elif "encoder" in [name for name, _ in sharing.stacks]:
        yield (
            f"The encoder caches nothing: what sharing saves there are {saved}. The cache is that of one token read by "
            "the encoder (cross-attention) and one written by the decoder."
        )


def drawing(sharing: SharingMap, geometry: ModelGeometry) -> Drawing:
    """What the figure shows of a map: groups that borrow, wholly or in part, and those that are used."""
    lenders = {
        (layer, geometry.layers[layer].group_of(head))
        for row in sharing.layers.values()
        for layer, head in filter(None, row)
    }
    looks = {}
    for index, layer in enumerate(geometry.layers):
        own = sharing.own_groups(index, layer)
        row = sharing.layers.get(index, (None,) * layer.heads)
        for group in range(layer.groups):
            used = {source[0] for head in layer.heads_of(group) if (source := row[head])}
            state = PARTIAL if used else OWN
            if group not in own:
                state = BORROWED
            elif (index, group) in lenders:
                state = SOURCE
            if state != OWN:
                numbers = sorted(in_stack(geometry.stacks, source).number for source in used)
                # The source layer, or the first and the last of several.
                label = "\n".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))) if numbers else ""
                looks[index, group] = replace(LOOKS[state], label=label)
    borrowed = sum(look.state == BORROWED for look in looks.values())
    return Drawing(
        title=f"Shared attention: {borrowed} of {geometry.total_groups} KV groups borrow attention, and have no keys",
        note="Number in a cell: source layer, or the first and the last of several",
        looks=looks,
        legend=(SOURCE, PARTIAL, BORROWED),
    )
