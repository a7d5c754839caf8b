"""Runs the layers of a model one after the other over all sequences, so that each layer's weights are needed once.

A layer is called as the model itself calls it: with the keywords (masks, positions, rotary tables) that it passed in a
forward pass over sequences of the same length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sa_convert.calibrate.probe import Probe


class Replay:
    """The states (N, T, hidden) of N sequences before the next layer, and how to call each layer.

    tokens: (N, T), all of one length and without padding. Sequences run `batch` at a time.
    """

    def __init__(self, probe: "Probe", tokens: "torch.Tensor", batch: int = 4) -> None:
        import torch

        self.probe, self.batch = probe, batch
        self._calls: list[dict[str, Any]] = []
        states = [self._trace(chunk, keep=start == 0) for start, chunk in enumerate(tokens.split(1))]
        self.states = torch.cat(states)

    def _trace(self, tokens: "torch.Tensor", keep: bool) -> "torch.Tensor":
        """The input (1, T, hidden) of the first layer; keep: note how every layer is called."""
        import torch

        found: list[torch.Tensor] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not found:
                found.append(hidden.detach().clone())
                if not keep:
                    raise _Enough
            self._calls.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self.probe.layers]
        try:
            with torch.no_grad():
                self.probe.model(input_ids=tokens, use_cache=False)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found[0]

    def run(self, layer: int, states: "torch.Tensor") -> "torch.Tensor":
        """States (B, T, hidden) after a layer."""
        output = self.probe.layers[layer](states, **self._calls[layer])
        return output[0] if isinstance(output, tuple) else output


class _Enough(Exception):
    """The first layer was reached, which was all that was wanted."""


@contextmanager
def captured(module: Any, take: Callable[["torch.Tensor", "torch.Tensor"], None]) -> Iterator[None]:
    """While open, `take` gets the input and the output of every call of a module."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        take(given, output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
