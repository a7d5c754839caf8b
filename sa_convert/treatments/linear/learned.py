"""The maps that were fitted for a base model, for all that is done with them while it is open."""

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_convert.models.processes import shared, summed
from sa_convert.treatments.linear.maps import Affine, Moments, fitted

if TYPE_CHECKING:
    import torch

    from sa_convert.treatments.ledger import Observed


@dataclass(frozen=True)
class Learned:
    """By layer: the map to what the attention module puts out, and that to the outputs of its heads, (T, hidden) to (T,
    H * D), before the output projection. The latter is only known if a search asks for it."""

    maps: Mapping[int, Affine]
    heads: Mapping[int, Affine]


_OPEN: ContextVar[Learned | None] = ContextVar("maps of layers", default=None)


def learn(session: Any, layers: Iterable[int], *, heads: bool) -> None:
    """Fit the maps of each of these layers to the base model. session: a `sa_convert.observe.session.Session`, whose
    sequences count by their weight. heads: whether to fit maps to the outputs of heads, too."""
    layers = tuple(layers)
    fit, held = (
        _moments(session.probe, layers, part, heads) for part in (session.samples.fit, session.samples.held_out)
    )
    maps, parts = ({layer: fitted(fit[at][layer], held[at][layer]) for layer in fit[at]} for at in (0, 1))
    _OPEN.set(Learned(maps, parts))


def learned() -> Learned:
    """Of the base model that is open. Raises LookupError if nothing was fitted to it."""
    found = _OPEN.get()
    if found is None:
        raise LookupError("layers are tried with linear maps before any were fitted: call search.fitting.learn first")
    return found


def change_of_heads(observed: "Observed") -> "torch.Tensor":
    """By what the outputs (T, H, D) of a layer's heads change, if a linear map takes the place of its attention."""
    assert observed.states is not None
    output = observed.output.float()
    return learned().heads[observed.layer].of(observed.states.float()).view_as(output) - output


def _moments(
    probe: Any, layers: tuple[int, ...], samples: Iterable[Any], heads: bool
) -> tuple[dict[int, Moments], dict[int, Moments]]:
    """Of what the attention modules of these layers put out, and of the outputs of their heads if these are wanted."""
    import torch

    found = {layer: Moments() for layer in layers}, {layer: Moments() for layer in layers if heads}
    outputs: dict[int, torch.Tensor] = {}
    weight = 1.0

    def note(seen: Any) -> None:
        if seen.layer in found[1]:
            outputs[seen.layer] = seen.output[0].flatten(1)

    def take(layer: int, states: "torch.Tensor", output: "torch.Tensor") -> None:
        found[0][layer].add(states[0], output[0], weight)
        if layer in outputs:
            found[1][layer].add(states[0], outputs.pop(layer), weight)

    with torch.no_grad(), probe.observing(note), probe.watching(layers, take):
        for _, sample in shared(samples):
            weight = sample.weight
            probe.model(**sample.inputs(probe.model).kwargs)
    for of_layer in found:
        sums = summed({(layer, name): part for layer, one in of_layer.items() for name, part in vars(one).items()})
        for (layer, name), part in sums.items():
            setattr(of_layer[layer], name, part)
    return found
