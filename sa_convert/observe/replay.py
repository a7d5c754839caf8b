"""Runs the layers of a model one after the other over all sequences, so that each layer's weights are needed once.

A layer is called as the model itself calls it: with the keywords (masks, positions, rotary tables) that it passed in a
forward pass over sequences of the same length.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sa_convert.models.arguments import first_argument

if TYPE_CHECKING:
    from sa_convert.observe.probe import Probe
    from sa_convert.observe.sequences import Sample


class Replay:
    """The states (N, T, hidden) of N sequences before the next layer, and how to call each layer.

    samples: all of one length and without padding. Sequences run `batch` at a time, one by one if the model hands
    its layers something that is made for each sequence.
    """

    def __init__(self, probe: "Probe", samples: "Sequence[Sample]", batch: int = 4) -> None:
        self.probe = probe
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states = [self._trace(sample, keep=at == 0) for at, sample in enumerate(samples)]
        self.states = torch.cat(states) if states else torch.zeros(0)
        self.batch = batch if probe.family.modules.interface else 1

    def _trace(self, sample: "Sample", keep: bool) -> torch.Tensor:
        """The input (1, T, hidden) of the first layer; keep: note how every layer is called."""
        states: list[torch.Tensor] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, name = first_argument(module, args, kwargs)
            if not states:
                states.append(hidden.detach().clone())
                if not keep:
                    raise _Enough
            self._calls.append((args[1:], {key: value for key, value in kwargs.items() if key != name}))

        hooks = [block.module.register_forward_pre_hook(note, with_kwargs=True) for block in self.probe.blocks]
        try:
            with torch.no_grad():
                self.probe.model(**sample.inputs(self.probe.model).kwargs)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return states[0]

    def run(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """States (B, T, hidden) after a layer."""
        args, kwargs = self._calls[layer]
        output = self.probe.blocks[layer].module(states, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Enough(Exception):
    """The first layer was reached, which was all that was wanted."""


@contextmanager
def captured(module: Any, take: Callable[[torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """While open, `take` gets the input and the output of every call of a module."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, _ = first_argument(module, args, kwargs)
        take(given, output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
