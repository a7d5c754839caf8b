"""How windows are told and drawn: report, card, dry run, `inspect`, and figure."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.plan import Arguments, Plan
from sa_convert.domain.stacks import layer_names
from sa_convert.domain.treated import Drawing, Inspected, Look, Treated

NAME = "window"
PAPER = "https://arxiv.org/abs/2410.10819"

LOOK = Look("window", "#f0d64f", "sees its first tokens and a window", mark="edges")

SHADES = {64: "#d9a700", 128: "#e6bf26", 256: LOOK.colour, 512: "#f5e57e"}
"""Colours of windows up to these lengths: the shorter, the darker."""

LONGEST = "#f9f1b0"

Window = tuple[int, int]
"""Sinks, and tokens of the window."""


def treated(plan: Plan, geometry: ModelGeometry) -> Treated:
    """What a plan does by windows."""
    found = _by_window(plan)
    groups = sum(map(len, found.values()))
    count = f"{groups} of {geometry.total_groups} KV groups"
    told = ", ".join(f"{len(places)} {_words(window)}" for window, places in found.items()) or "none"
    return Treated(
        name=NAME,
        label="Windows",
        summary=f"{count}, in {len(plan.groups_of(NAME))} layers: {told}",
        rows=(("KV groups with windows", count), ("of which see", told)),
        lead=(
            f"{count} see, and cache, only the first tokens of a sequence and the most recent ones, at their true "
            f"positions (after [DuoAttention]({PAPER}))"
        ),
        heading="What is windowed",
        caption="What is done to which KV groups",
        table=tuple(_table(found, plan)),
        remarks=(
            f"What KV groups with windows cache never grows beyond {_most(found):,} tokens, however long the text is: "
            "the longer the text, the larger the part of the cache that is saved.",
        ),
    )


def drawing(plan: Plan, geometry: ModelGeometry) -> Drawing:
    """What the figure shows of windows: how long each is."""
    looks = {
        (layer, group): replace(LOOK, label=_short(window["tokens"]), colour=_shade(window["tokens"]))
        for layer, groups in plan.groups_of(NAME).items()
        for group, window in groups.items()
    }
    return Drawing(
        title=f"Windows: {len(looks)} of {geometry.total_groups} KV groups",
        note="Number between bars: tokens in the window; the shorter, the darker",
        looks=looks,
        legend=(LOOK.state,),
    )


def inspected(geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
    """What `inspect` tells of a converted model's windows."""
    if geometry is None or not plan or not plan.groups_of(NAME):
        return Inspected(reason)
    return Inspected(reason, rows=(("Windows", treated(plan, geometry).summary),))


def _by_window(plan: Plan) -> dict[Window, list[tuple[int, int]]]:
    """Layers and KV groups by what they see, the shortest window first."""
    found: dict[Window, list[tuple[int, int]]] = {}
    for layer, groups in plan.groups_of(NAME).items():
        for group, window in groups.items():
            found.setdefault(_window(window), []).append((layer, group))
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0])))


def _window(arguments: Mapping[str, int] | Arguments) -> Window:
    return arguments["sinks"], arguments["tokens"]


def _words(window: Window) -> str:
    sinks, tokens = window
    first = f"the first {sinks} and " if sinks else ""
    return f"{first}the last {tokens:,}"


def _short(tokens: int) -> str:
    """A number that a cell has room for: 256, 1k, 1.5k."""
    return str(tokens) if tokens < 1000 else f"{tokens / 1024:.1f}".removesuffix(".0") + "k"


def _shade(tokens: int) -> str:
    return next((colour for most, colour in SHADES.items() if tokens <= most), LONGEST)


def _most(found: Mapping[Window, object]) -> int:
    return max((sum(window) for window in found), default=0)


def _table(found: Mapping[Window, list[tuple[int, int]]], plan: Plan) -> Iterator[str]:
    """Which KV groups see what."""
    yield "| tokens that are seen | KV groups | layers (KV groups in them, if there are several) |"
    yield "|---|---|---|"
    for window, places in found.items():
        counts = Counter(layer for layer, _ in places)
        names = []
        for number in sorted(set(counts.values())):
            layers = layer_names(plan.stacks, [layer for layer in counts if counts[layer] == number])
            names.append(layers if number == 1 else f"{layers} ({number})")
        yield f"| {_words(window)} | {len(places)} | {', '.join(names)} |"
