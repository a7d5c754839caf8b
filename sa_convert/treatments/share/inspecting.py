"""What `inspect` tells of sharing: which layers can borrow from which, and what a converted model shares already."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.stacks import in_stack, layer_names
from sa_convert.domain.treated import Inspected
from sa_convert.treatments.share.rules import layer_difference
from sa_convert.treatments.share.sharing_map import SharingMap

FIRST_OF_ITS_KIND = "no earlier layer of its kind"


@dataclass(frozen=True)
class Kind:
    """Layers whose attention means the same, so that each can borrow from the earlier ones.

    reusing: layers that can borrow. groups: their KV groups, which is what sharing could remove at most.
    """

    stack: str
    attention: str
    window: int | None
    rotary: bool
    layers: tuple[int, ...]
    reusing: tuple[int, ...]
    groups: int


def inspected(geometry: ModelGeometry | None, shared: SharingMap | None, reason: str | None) -> Inspected:
    """shared: of a converted model. reason: why the model cannot be converted, or None."""
    kinds = kinds_of(geometry) if geometry else ()
    if reason is None and not any(kind.reusing for kind in kinds):
        reason = "Every layer is the only one of its kind, so none has an earlier layer to borrow from."
    rows = [*_shared_already(geometry, shared), *_possible(geometry, kinds, reason)]
    return Inspected(reason, {"sharing": _section(geometry, kinds, shared, reason)}, tuple(rows))


def kinds_of(geometry: ModelGeometry) -> tuple[Kind, ...]:
    """The classes of layers that the rules of sharing allow to share, by their first layers."""
    classes: list[list[int]] = []
    for index, layer in enumerate(geometry.layers):
        if not layer.heads:
            continue
        home = next((c for c in classes if layer_difference(geometry.layers[c[0]], layer) is None), None)
        if home is None:
            classes.append([index])
        else:
            home.append(index)
    kinds = []
    for members in classes:
        first = geometry.layers[members[0]]
        groups = sum(geometry.layers[index].groups for index in members[1:])
        reusing = tuple(members[1:])
        kinds.append(Kind(first.stack, first.attention, first.window, first.rotary, tuple(members), reusing, groups))
    return tuple(kinds)


def _section(
    geometry: ModelGeometry | None, kinds: tuple[Kind, ...], shared: SharingMap | None, reason: str | None
) -> dict[str, Any]:
    first = sorted(kind.layers[0] for kind in kinds)
    return {
        "possible": reason is None,
        "reason": reason,
        "total_groups": geometry.total_groups if geometry else None,
        "shareable_groups": _most(kinds, reason),
        "kinds": [_kind_json(kind, geometry) for kind in kinds],
        "layers_without_source": {geometry.label(at): FIRST_OF_ITS_KIND for at in first} if geometry else {},
        "reused_groups": shared.reused_groups(geometry) if shared and geometry else 0,
        "layers": shared.to_json() if shared else {},
    }


def _most(kinds: tuple[Kind, ...], reason: str | None) -> int:
    """KV groups that sharing could remove at most."""
    return 0 if reason else sum(kind.groups for kind in kinds)


def _kind_json(kind: Kind, geometry: ModelGeometry | None) -> dict[str, Any]:
    """Layers by their numbers in the stack."""
    stacks = geometry.stacks if geometry else ()
    numbers = {key: [in_stack(stacks, layer).number for layer in getattr(kind, key)] for key in ("layers", "reusing")}
    return {**asdict(kind), **numbers}


def _shared_already(geometry: ModelGeometry | None, shared: SharingMap | None) -> Iterator[tuple[str, str]]:
    if shared and shared.layers and geometry:
        reused, layers = shared.reused_groups(geometry), layer_names(geometry.stacks, shared.layers)
        yield "Shares already", f"{reused} of {geometry.total_groups} KV groups, in layers {layers}"


def _possible(geometry: ModelGeometry | None, kinds: tuple[Kind, ...], reason: str | None) -> Iterator[tuple[str, str]]:
    if reason or geometry is None:
        yield "Can share", f"no: {reason}"
        return
    within = ", within each stack" if len(geometry.stacks) > 1 else ""
    yield "Can share", "yes, by " + ("query head" if geometry.granularity == "head" else "whole layers only") + within
    for kind in kinds:
        yield "", f"{geometry.layers[kind.layers[0]].kind}: {_reach(kind, geometry)}"
    groups, total = _most(kinds, reason), geometry.total_groups
    yield "At most", f"{groups} of {total} KV groups can lose their keys ({groups / total:.1%})"


def _reach(kind: Kind, geometry: ModelGeometry) -> str:
    """Which layers of a kind can borrow from which."""
    first = f"layer {geometry.label(kind.layers[0])} cannot, no earlier layer is of its kind"
    if not kind.reusing:
        return first
    plural = "layer" if len(kind.reusing) == 1 else "layers"
    return f"{plural} {layer_names(geometry.stacks, kind.reusing)} can borrow from earlier ones of this kind; {first}"
