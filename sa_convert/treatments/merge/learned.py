"""What was learned of the layers of a base model, for all that is done with them while it is open."""

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sa_convert.domain.model import Model
from sa_convert.models.processes import shared, summed
from sa_convert.treatments.merge.bases import Merged, merged
from sa_convert.treatments.merge.projections import read_layer

if TYPE_CHECKING:
    import torch


class LearnedMoments:
    """Second moments (n, n) of what goes into the attention of layers, with a 1 at its end, and what was made of
    them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.moments: dict[int, torch.Tensor] = {}
        self._merged: dict[tuple[int, int], tuple[Merged, ...]] = {}

    def see(self, layer: int, states: "torch.Tensor", weight: float) -> None:
        """states: (T, hidden), of one sequence."""
        import torch

        inputs = torch.cat([states.float(), states.new_ones(len(states), 1, dtype=torch.float32)], dim=1)
        found = weight * (inputs.T @ inputs).double().cpu()
        self.moments[layer] = self.moments[layer] + found if layer in self.moments else found

    def merged(self, layer: int, groups: int) -> tuple[Merged, ...]:
        """For each of so many KV groups that a layer has left, what makes it of those that it had."""
        if (layer, groups) not in self._merged:
            self._merged[layer, groups] = tuple(self._made(layer, groups))
        return self._merged[layer, groups]

    def _made(self, layer: int, groups: int) -> Iterator[Merged]:
        queries, keys, values, outputs = read_layer(self.model, layer)
        count = self.model.geometry.layers[layer].groups // groups
        for first in range(0, count * groups, count):
            some = slice(first, first + count)
            yield merged(queries[some], keys[some], values[some], outputs[some], moment=self.moments[layer])


_OPEN: ContextVar[LearnedMoments | None] = ContextVar("moments of layers", default=None)


def learn(session: Any, layers: Iterable[int]) -> None:
    """See what goes into these layers of the base model. session: a `sa_convert.observe.session.Session`, whose
    sequences count by their weight."""
    import torch

    found, weight = LearnedMoments(session.model), 1.0

    def take(layer: int, states: "torch.Tensor", output: "torch.Tensor") -> None:
        found.see(layer, states[0], weight)

    with torch.no_grad(), session.probe.watching(tuple(layers), take):
        for _, sample in shared(session.samples.fit):
            weight = sample.weight
            session.probe.model(**sample.inputs(session.probe.model).kwargs)
    found.moments = summed(found.moments)
    _OPEN.set(found)


def learned() -> LearnedMoments:
    """Of the base model that is open. Raises LookupError if nothing was learned of it."""
    found = _OPEN.get()
    if found is None:
        raise LookupError("KV groups are merged before the model was seen: call search.fitting.learn first")
    return found
