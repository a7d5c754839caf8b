"""How one attention layer of a model becomes several of vLLM, so that each pages what it needs. Imports nothing.

vLLM gives every attention layer one kind of pages, and pages of all layers must be of one size. So the KV groups of a
layer are divided into *parts*: consecutive KV groups with the same window, or none, and as many in every part of the
model as its parts allow (the *unit*):

    layer 7 of the model     KV groups   0        1        2
                             windows     512      512      none
    layers of vLLM (unit 1)              groups_0 groups_1 groups_2

A window of vLLM's frees pages that its layer has left behind. Layers of one *page class* share block tables, and a
class is as wide as the widest of its windows. More classes free more and cost time at every step, so those are chosen
that need the least memory for a text of the length that the engine was started for.
"""

from collections import Counter
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, pairwise
from math import gcd


@dataclass(frozen=True, order=True)
class Window:
    """What a KV group sees: the first tokens of a text (sinks), and the most recent ones."""

    tokens: int
    sinks: int


@dataclass(frozen=True)
class Part:
    """Consecutive KV groups of one layer. window: None if they see every token that the layer's own window lets
    them."""

    first: int
    count: int
    window: Window | None


def windows_of(described: dict, groups: int) -> dict[int, list[Window | None]]:
    """The window of each KV group, by layer. described: `shared_attention` of a config.json, of version 2."""
    found: dict[int, list[Window | None]] = {}
    for label, layer in described["layers"].items():
        if isinstance(layer, str):
            continue
        for group, treated in layer.items():
            if "window" in treated:
                told = treated["window"]
                row = found.setdefault(int(label), [None] * groups)
                row[int(group)] = Window(int(told["tokens"]), int(told["sinks"]))
    return found


def without_windows(described: dict) -> dict:
    """The same plan, for code that is not to run its windows: they change no weight."""
    layers: dict = {}
    for label, layer in described["layers"].items():
        if isinstance(layer, str):
            layers[label] = layer
            continue
        kept = {
            group: {name: told for name, told in treated.items() if name != "window"}
            for group, treated in layer.items()
        }
        if kept := {group: treated for group, treated in kept.items() if treated}:
            layers[label] = kept
    return {**described, "layers": layers}


def _runs(row: list[Window | None]) -> list[Part]:
    runs: list[Part] = []
    for group, window in enumerate(row):
        if runs and runs[-1].window == window:
            runs[-1] = Part(runs[-1].first, runs[-1].count + 1, window)
        else:
            runs.append(Part(group, 1, window))
    return runs


def unit_of(windows: dict[int, list[Window | None]], groups: int, ranks: int) -> int:
    """KV groups in a part: the most that divides every run of equal windows, in every rank of tensor parallelism."""
    share = groups // ranks
    counts = [share]
    for row in windows.values():
        for rank in range(ranks):
            counts += [run.count for run in _runs(row[rank * share : (rank + 1) * share])]
    return reduce(gcd, counts)


def parts_of(row: list[Window | None], unit: int) -> list[Part]:
    """One layer's parts, or those of a rank's share of it."""
    return [
        Part(first, unit, run.window) for run in _runs(row) for first in range(run.first, run.first + run.count, unit)
    ]


@dataclass(frozen=True)
class Need:
    """What one token class of pages costs: how many tokens a text of the reference length holds in it, and sinks."""

    tokens: int
    sinks: int

    def blocks(self, block: int, length: int, at_once: int) -> int:
        """Pages of one layer, as vLLM reserves them: window, the tokens of a step, and one more that is begun."""
        most = -(-length // block)
        return min(-(-min(self.tokens - 1 + at_once, length) // block) + 1 + -(-self.sinks // block), most)


def page_classes(counts: dict[Window, int], full: int, block: int, length: int, at_once: int) -> dict[Window, Window]:
    """The class of each window, which is as wide as the widest window in it.

    counts: how many parts have each window. full: how many see everything. block: tokens in a page. length: of a text.
    at_once: tokens that a step may compute. vLLM makes groups of as many layers each as the smallest class has, or as
    the largest if it is less than half as many again, and fills the last group of a class up.
    """
    ordered = sorted(counts)
    best: tuple | None = None
    for cuts in range(len(ordered)):
        for places in combinations(range(1, len(ordered)), cuts):
            edges = [0, *places, len(ordered)]
            classes = [ordered[start:stop] for start, stop in pairwise(edges)]
            wide = [Window(each[-1].tokens, max(window.sinks for window in each)) for each in classes]
            sizes = [sum(counts[window] for window in each) for each in classes]
            needs = [Need(window.tokens, window.sinks).blocks(block, length, at_once) for window in wide]
            if full:
                sizes, needs = [*sizes, full], [*needs, -(-length // block)]
            size, tables = _tables(sizes)
            pages = size * sum(table * need for table, need in zip(tables, needs, strict=True))
            cost = pages * (1 + sum(tables) / 100)  # each block table takes time at every step
            if best is None or cost < best[0]:
                best = cost, {window: to for each, to in zip(classes, wide, strict=True) for window in each}
    return best[1] if best else {}


def _tables(sizes: list[int]) -> tuple[int, list[int]]:
    """How many layers vLLM puts in a group, and how many groups it makes of each class of so many layers."""
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    return size, [-(-number // size) for number in sizes]


def room(layers: list[tuple[int | None, float]], block: int, length: int, at_once: int) -> float:
    """What vLLM reserves for a text: pages, times their size. layers: the window of each, and the size of its pages.

    If all have the same window, or none, pages are as large as each layer's are. Otherwise all are as large as the
    largest, and layers are grouped as in `page_classes`.
    """
    most = -(-length // block)
    windows = {window for window, _ in layers}
    if len(windows) == 1:
        return most * sum(size for _, size in layers)
    counts = Counter(layers)
    needs = [most if window is None else -(-min(window - 1 + at_once, length) // block) + 1 for window, _ in counts]
    size, tables = _tables(list(counts.values()))
    return max(size for _, size in layers) * size * sum(a * b for a, b in zip(tables, needs, strict=True))
