"""What each layer owns, lends and borrows: the sharing map, prepared for the forward pass."""

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Run:
    """Consecutive heads `start:stop` along the head axis of a loan of `layer`, or of the layer's own (None)."""

    layer: int | None
    start: int
    stop: int


def _runs(places: list[tuple[int | None, int]]) -> tuple[Run, ...]:
    """Join consecutive places (layer, index) of one layer."""
    keyed = groupby(enumerate(places), key=lambda item: (item[1][0], item[1][1] - item[0]))
    runs = ([place for _, place in items] for _, items in keyed)
    return tuple(Run(run[0][0], run[0][1], run[-1][1] + 1) for run in runs)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer owns, lends and borrows; made once from the map.

    heads: per query head, None (own) or (source layer, source head). group: query heads per key/value group.
    own: own query heads. own_groups: groups with an own head. own_group: own heads per own group where that is the same
    for all, else None. query_runs: for every head, where its query (or weights) lies. key_runs and key_group: where the
    keys lie, and how many consecutive heads read each. settled: source layers that are done after this one. Of the
    whole stack, gain: heads that reuse, for each own head of layers that lend; lenders_at_once: the most layers whose
    loans are kept at any time.
    """

    layer: int
    heads: tuple
    group: int
    own: tuple[int, ...]
    own_groups: tuple[int, ...]
    own_group: int | None
    query_runs: tuple[Run, ...]
    key_runs: tuple[Run, ...]
    key_group: int
    lends: bool
    settled: tuple[int, ...]
    gain: float = 0.0
    lenders_at_once: int = 1

    @property
    def reuses(self) -> bool:
        return len(self.own) < len(self.heads)

    @property
    def lenders(self) -> list[int]:
        """The layers that this one borrows from."""
        return sorted({run.layer for run in self.query_runs if run.layer is not None})

    @property
    def packs_cache(self) -> bool:
        """A layer that owns every key caches as its family does."""
        return len(self.own_groups) < len(self.heads) // self.group

    @property
    def own_key_of_head(self) -> list[int]:
        """For every own head, the index of its key among the layer's own keys."""
        return [self.own_groups.index(head // self.group) for head in self.own]


def plan_layers(sharing: dict[int, tuple], heads: list[int], groups: list[int]) -> dict[int, LayerPlan]:
    """Plan every layer that reuses or lends.

    sharing: for each reusing layer, per query head, None or (source layer, source head). heads, groups: query heads of
    each layer, and query heads per key/value group. Raises ValueError where the map does not fit the model.
    """
    full = {}
    for layer in range(len(heads)):
        row = sharing.get(layer, (None,) * heads[layer])
        if len(row) != heads[layer]:
            raise ValueError(f"shared_attention: layer {layer} lists {len(row)} heads, the model has {heads[layer]}.")
        full[layer] = tuple(None if source is None else (int(source[0]), int(source[1])) for source in row)
    if unknown := set(sharing) - set(full):
        raise ValueError(f"shared_attention: the model has no layer {min(unknown)}.")
    for layer, row in full.items():
        for head, source in enumerate(row):
            if source is None:
                continue
            if not 0 <= source[0] < layer or not 0 <= source[1] < heads[source[0]] or full[source[0]][source[1]]:
                raise ValueError(
                    f"shared_attention: layer {layer} head {head} reuses layer {source[0]} head {source[1]}, "
                    "which is not an own head of an earlier layer."
                )
    own = {layer: tuple(head for head, source in enumerate(row) if source is None) for layer, row in full.items()}
    own_groups = {layer: tuple(sorted({head // groups[layer] for head in own[layer]})) for layer in full}
    last_use = {source[0]: layer for layer, row in full.items() for source in row if source}
    reused = sum(source is not None for row in full.values() for source in row)
    gain = reused / max(sum(len(own[lender]) for lender in last_use), 1)
    at_once = max((sum(lender <= layer < last for lender, last in last_use.items()) for layer in full), default=0)

    def place(layer, head):
        """Where the query and the key of this head lie: (layer or None, index among its own heads, and keys)."""
        source = full[layer][head]
        at, index = (layer, head) if source is None else source
        key = own_groups[at].index(index // groups[at])
        return (None if source is None else at), own[at].index(index), key

    plans = {}
    for layer, row in full.items():
        if not any(row) and layer not in last_use:
            continue
        places = [place(layer, head) for head in range(len(row))]
        keys = [(at, key) for at, _, key in places]
        group = groups[layer]
        aligned = all(len(set(keys[start : start + group])) == 1 for start in range(0, len(keys), group))
        sizes = {sum(head // group == kept for head in own[layer]) for kept in own_groups[layer]}
        plans[layer] = LayerPlan(
            layer=layer,
            heads=row,
            group=group,
            own=own[layer],
            own_groups=own_groups[layer],
            own_group=sizes.pop() if len(sizes) == 1 else None,
            query_runs=_runs([(at, query) for at, query, _ in places]),
            key_runs=_runs(keys[::group] if aligned else keys),
            key_group=group if aligned else 1,
            lends=layer in last_use,
            settled=tuple(source for source, last in last_use.items() if last == layer),
            gain=gain,
            lenders_at_once=at_once,
        )
    return plans
