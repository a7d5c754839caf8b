"""The smallest sets of query heads that can give up their attention, and a number for every query head of a model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.sharing_map import SharingMap, Source


@dataclass(frozen=True, order=True)
class Unit:
    """Query heads that reuse together or not at all: those of one KV group, or all of a layer.

    groups: the KV groups whose keys go. heads: the query heads.
    """

    layer: int
    groups: tuple[int, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """All units of a model, and the numbering of its query heads: layer by layer, head by head."""

    geometry: ModelGeometry

    @cached_property
    def all(self) -> tuple[Unit, ...]:
        units = []
        for index, layer in enumerate(self.geometry.layers):
            if self.geometry.granularity == "layer" and layer.heads:
                units.append(Unit(index, tuple(range(layer.groups)), tuple(range(layer.heads))))
            else:
                units.extend(Unit(index, (group,), tuple(layer.heads_of(group))) for group in range(layer.groups))
        return tuple(units)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The number of each layer's first head, and at last the number of all heads."""
        numbers = [0]
        for layer in self.geometry.layers:
            numbers.append(numbers[-1] + layer.heads)
        return tuple(numbers)

    @cached_property
    def _unit_of(self) -> dict[Source, Unit]:
        return {(unit.layer, head): unit for unit in self.all for head in unit.heads}

    @cached_property
    def _places(self) -> tuple[Source, ...]:
        return tuple((index, head) for index, layer in enumerate(self.geometry.layers) for head in range(layer.heads))

    def number(self, place: Source) -> int:
        """The number of a head at (layer, head)."""
        return self.offsets[place[0]] + place[1]

    def place(self, number: int) -> Source:
        """(layer, head) of a head by its number."""
        return self._places[number]

    def unit_of(self, place: Source) -> Unit:
        return self._unit_of[place]

    def keys_of(self, unit: Unit) -> int:
        """Elements of one token's keys that the unit caches; see `ModelGeometry.keys`."""
        return self.geometry.keys(unit.layer, len(unit.groups))

    @cached_property
    def all_keys(self) -> int:
        """Elements of one token's keys in the whole model."""
        return sum(self.keys_of(unit) for unit in self.all)

    def to_map(self, sources: "Mapping[Unit, tuple[Source, ...]]") -> SharingMap:
        """The sharing map in which these units reuse these sources, one for each of their heads."""
        rows: dict[int, list[Source | None]] = {}
        for unit, chosen in sources.items():
            row = rows.setdefault(unit.layer, [None] * self.geometry.layers[unit.layer].heads)
            for head, source in zip(unit.heads, chosen, strict=True):
                row[head] = source
        return SharingMap({layer: tuple(row) for layer, row in rows.items()}, self.geometry.stacks)

    def from_map(self, sharing: SharingMap) -> dict[Unit, tuple[Source, ...]]:
        """The units all of whose heads reuse, with their sources."""
        reusing = {}
        for unit in self.all:
            row = sharing.layers.get(unit.layer)
            if row is not None:
                chosen = [source for head in unit.heads if (source := row[head]) is not None]
                if len(chosen) == len(unit.heads):
                    reusing[unit] = tuple(chosen)
        return reusing

    def users_of(self, unit: Unit, chosen: "Mapping[Unit, tuple[Source, ...]]") -> list[Unit]:
        """The units some of whose heads have their source in `unit`."""
        return [user for user, sources in chosen.items() if any(self.unit_of(s) == unit for s in sources)]

    def removed_keys(self, units: Iterable[Unit]) -> float:
        """The part of the key cache that these units take."""
        return sum(self.keys_of(unit) for unit in units) / self.all_keys
