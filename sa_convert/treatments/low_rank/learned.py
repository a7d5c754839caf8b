"""What was learned of the keys and values of a base model, for all that is done with them while it is open."""

from contextvars import ContextVar
from typing import TYPE_CHECKING

from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.units import Units
from sa_convert.models.processes import summed
from sa_convert.treatments.low_rank.bases import Basis, GroupMoments
from sa_convert.treatments.low_rank.rules import Side, refusal
from sa_convert.treatments.low_rank.scores import gradient_of_keys

if TYPE_CHECKING:
    import torch

    from sa_convert.treatments.ledger import Observed

Place = tuple[int, int, Side]
"""A layer, a KV group, and what it is of."""


class LearnedBases:
    """Moments of every KV group that may be treated, and the bases that were made of them.

    Those of values are moments of the outputs of heads, which are sums of values: what goes wrong with a value matters
    as far as it is in such a sum.
    """

    def __init__(self, geometry: ModelGeometry) -> None:
        self.geometry = geometry
        self.moments: dict[Place, GroupMoments] = {}
        self._bases: dict[tuple[Place, int], Basis] = {}

    def see(self, observed: "Observed") -> None:
        """One layer of the base model in a pass over a sequence."""
        index, layer = observed.layer, self.geometry.layers[observed.layer]
        if observed.slope:
            return
        if refusal(self.geometry, index) is None:
            assert observed.key is not None
            assert observed.turned is not None
            keys = observed.turned(observed.key.float(), True)
            gradients = observed.turned(gradient_of_keys(observed), True)
            for group in range(layer.groups):
                self._add((index, group, "keys"), keys[group], gradients[group], observed.weight)
        if refusal(self.geometry, index, "values") is None:
            for group in range(layer.groups):
                heads = list(layer.heads_of(group))
                outputs, slopes = (
                    states[:, heads].float().flatten(0, 1) for states in (observed.output, observed.gradient)
                )
                self._add((index, group, "values"), outputs, slopes, observed.weight)

    def _add(self, place: Place, states: "torch.Tensor", gradients: "torch.Tensor", weight: float) -> None:
        self.moments.setdefault(place, GroupMoments(states.shape[-1])).add(states, gradients, weight)

    def basis(self, layer: int, group: int, rank: int, side: Side = "keys") -> Basis:
        place: Place = (layer, group, side)
        if (place, rank) not in self._bases:
            self._bases[place, rank] = self.moments[place].basis(rank, about_mean=side == "keys")
        return self._bases[place, rank]

    def join(self) -> None:
        """Add up what several processes have seen."""
        parts = summed({(place, name): part for place, one in self.moments.items() for name, part in vars(one).items()})
        for (place, name), part in parts.items():
            size = self.geometry.layers[place[0]].head_dim
            setattr(self.moments.setdefault(place, GroupMoments(size)), name, part)


_OPEN: ContextVar[LearnedBases | None] = ContextVar("what was learned of keys and values", default=None)


def learner(units: Units) -> LearnedBases:
    """What learns of a base model; it is what `learned` gives from then on."""
    found = LearnedBases(units.geometry)
    _OPEN.set(found)
    return found


def learned() -> LearnedBases:
    """Of the base model that is open. Raises LookupError if nothing was learned of it."""
    found = _OPEN.get()
    if found is None:
        raise LookupError("low rank is tried before the model was seen: call search.fitting.learn first")
    return found
