"""The maps that were fitted for a base model, for all that is done with them while it is open."""

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sa_convert.treatments.linear.maps import Affine, Moments, fitted

if TYPE_CHECKING:
    import torch

_OPEN: ContextVar[Mapping[int, Affine] | None] = ContextVar("maps of layers", default=None)


def learn(session: Any, layers: Iterable[int]) -> None:
    """Fit the map of each of these layers to the base model. session: a `sa_convert.observe.session.Session`, whose
    sequences count by their weight."""
    layers = tuple(layers)
    fit, held = (
        _moments(session.probe, layers, samples) for samples in (session.samples.fit, session.samples.held_out)
    )
    _OPEN.set({layer: fitted(fit[layer], held[layer]) for layer in layers})


def learned() -> Mapping[int, Affine]:
    """By layer, of the base model that is open. Raises LookupError if none were fitted to it."""
    found = _OPEN.get()
    if found is None:
        raise LookupError("layers are tried with linear maps before any were fitted: call search.fitting.learn first")
    return found


def _moments(probe: Any, layers: tuple[int, ...], samples: Iterable[Any]) -> dict[int, Moments]:
    import torch

    found = {layer: Moments() for layer in layers}
    weight = 1.0

    def take(layer: int, states: "torch.Tensor", output: "torch.Tensor") -> None:
        found[layer].add(states[0], output[0], weight)

    with torch.no_grad(), probe.watching(layers, take):
        for sample in samples:
            weight = sample.weight
            probe.model(**sample.inputs(probe.model).kwargs)
    return found
