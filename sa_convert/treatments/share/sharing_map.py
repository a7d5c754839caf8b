"""The sharing map: which head's attention each query head uses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.stacks import Stacks, in_stack, layer_label, layer_of, parse_label

Source = tuple[int, int]
"""A source layer and a query head in it."""


@dataclass(frozen=True)
class SharingMap:
    """For each layer that borrows, per query head, None (own) or the source layer and source head.

    Layers without a borrower are left out. The map is resolved: a source head is always an own head; that, and
    everything else a model demands, is checked by `sa_convert.treatments.share.rules.check_map`. stacks: those of the
    model, which name its layers (see `sa_convert.domain.stacks`).
    """

    layers: Mapping[int, tuple[Source | None, ...]] = field(default_factory=dict)
    stacks: Stacks = ()

    def __post_init__(self) -> None:
        rows = {layer: tuple(self.layers[layer]) for layer in sorted(self.layers)}
        object.__setattr__(self, "layers", MappingProxyType({key: row for key, row in rows.items() if any(row)}))

    def __reduce__(self) -> tuple[Any, ...]:
        return SharingMap, (dict(self.layers), self.stacks)

    @classmethod
    def from_json(cls, layers: Mapping[Any, Any], stacks: Stacks = ()) -> "SharingMap":
        """From {"27": [[26, 4], null, ...]}, as in config.json, recipes and reports; sources are of the same stack.

        Raises ValueError for a stack that the model does not have.
        """
        rows = {}
        for label, row in layers.items():
            stack, number = parse_label(label)
            rows[layer_of(stacks, stack, number)] = tuple(
                None if source is None else (layer_of(stacks, stack, int(source[0])), int(source[1])) for source in row
            )
        return cls(rows, stacks)

    def to_json(self) -> dict[str, list[list[int] | None]]:
        """As {"27": [[26, 4], null, ...]}."""
        return {
            self.label(layer): [
                None if source is None else [in_stack(self.stacks, source[0]).number, source[1]] for source in row
            ]
            for layer, row in self.layers.items()
        }

    def label(self, layer: int) -> str:
        """How people name a layer: "27", or "decoder.cross.3"."""
        return layer_label(self.stacks, layer)

    def own_heads(self, layer: int, geometry: LayerGeometry) -> tuple[int, ...]:
        """Query heads of a layer that compute their own attention."""
        row = self.layers.get(layer)
        return tuple(head for head in range(geometry.heads) if row is None or row[head] is None)

    def own_groups(self, layer: int, geometry: LayerGeometry) -> tuple[int, ...]:
        """KV groups of a layer whose keys stay: those that an own head reads."""
        return tuple(sorted({geometry.group_of(head) for head in self.own_heads(layer, geometry)}))

    def reused_groups(self, geometry: ModelGeometry) -> int:
        """KV groups of the model that lose their keys."""
        kept = sum(len(self.own_groups(index, layer)) for index, layer in enumerate(geometry.layers))
        return geometry.total_groups - kept
