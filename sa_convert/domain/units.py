"""The smallest sets of query heads that can give up their attention, and a number for every query head of a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from sa_convert.domain.geometry import Head, ModelGeometry


@dataclass(frozen=True, order=True)
class Unit:
    """Query heads that are treated together or not at all: those of one KV group, or all of a layer.

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
    def _unit_of(self) -> dict[Head, Unit]:
        return {(unit.layer, head): unit for unit in self.all for head in unit.heads}

    @cached_property
    def _heads(self) -> tuple[Head, ...]:
        return tuple((index, head) for index, layer in enumerate(self.geometry.layers) for head in range(layer.heads))

    def number_of(self, head: Head) -> int:
        """The number of a head among all of the model."""
        return self.offsets[head[0]] + head[1]

    def head(self, number: int) -> Head:
        """A head by its number among all of the model."""
        return self._heads[number]

    def unit_of(self, head: Head) -> Unit:
        return self._unit_of[head]

    def keys_of(self, unit: Unit) -> int:
        """Elements of one token's keys that the unit caches; see `ModelGeometry.keys`."""
        return self.geometry.keys(unit.layer, len(unit.groups))

    @cached_property
    def all_keys(self) -> int:
        """Elements of one token's keys in the whole model."""
        return sum(self.keys_of(unit) for unit in self.all)

    def removed_keys(self, units: Iterable[Unit]) -> float:
        """The part of the key cache that these units take."""
        return sum(self.keys_of(unit) for unit in units) / self.all_keys
