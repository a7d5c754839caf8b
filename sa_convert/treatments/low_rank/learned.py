"""What was learned of the keys of a base model, for all that is done with them while it is open."""

from contextvars import ContextVar
from typing import TYPE_CHECKING

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.units import Units
from sa_convert.models.processes import summed
from sa_convert.treatments.low_rank.bases import Basis, KeyMoments
from sa_convert.treatments.low_rank.rules import refusal
from sa_convert.treatments.low_rank.scores import gradient_of_keys

if TYPE_CHECKING:
    from sa_convert.treatments.ledger import Observed

Place = tuple[int, int]
"""A layer and a KV group."""


class LearnedKeys:
    """KeyMoments of the keys of every KV group that may be treated, and the bases that were made of them."""

    def __init__(self, geometry: ModelGeometry) -> None:
        self.geometry = geometry
        self.moments: dict[Place, KeyMoments] = {}
        self._bases: dict[tuple[Place, int], Basis] = {}

    def see(self, observed: "Observed") -> None:
        """One layer of the base model in a pass over a sequence."""
        index, layer = observed.layer, self.geometry.layers[observed.layer]
        if observed.slope or refusal(self.geometry, index) is not None:
            return
        assert observed.key is not None
        assert observed.turned is not None
        keys = observed.turned(observed.key.float(), True)
        gradients = observed.turned(gradient_of_keys(observed), True)
        for group in range(layer.groups):
            moments = self.moments.setdefault((index, group), KeyMoments(layer.head_dim))
            moments.add(keys[group], gradients[group], observed.weight)

    def join(self) -> None:
        """Add up what several processes have seen."""
        parts = summed({(place, name): part for place, one in self.moments.items() for name, part in vars(one).items()})
        for (place, name), part in parts.items():
            moments = self.moments.setdefault(place, KeyMoments(self.geometry.layers[place[0]].head_dim))
            setattr(moments, name, part)

    def basis(self, layer: int, group: int, rank: int) -> Basis:
        key = (layer, group), rank
        if key not in self._bases:
            self._bases[key] = self.moments[layer, group].basis(rank)
        return self._bases[key]


_OPEN: ContextVar[LearnedKeys | None] = ContextVar("what was learned of keys", default=None)


def learner(units: Units) -> LearnedKeys:
    """What learns of a base model; it is what `learned` gives from then on."""
    found = LearnedKeys(units.geometry)
    _OPEN.set(found)
    return found


def learned() -> LearnedKeys:
    """Of the base model that is open. Raises LookupError if nothing was learned of it."""
    found = _OPEN.get()
    if found is None:
        raise LookupError("low-rank keys are tried before the model's keys were seen: call search.fitting.learn first")
    return found
