"""The reference for windows: scores out of reach are masked before the softmax of the unmodified base model."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from support.forced_softmax import SOFTMAX, _watched


class _Masked(TorchFunctionMode):
    """windows: by layer and query head, (sinks, tokens). running: the layers whose attention runs."""

    def __init__(self, windows):
        super().__init__()
        self.windows, self.running = windows, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.running and func in SOFTMAX and args[0].dim() > 2 and self.running[-1] in self.windows:
            args = (self.mask(args[0]), *args[1:])
        return func(*args, **kwargs or {})

    def mask(self, scores):
        layer = self.windows[self.running[-1]]
        heads = max(layer) + 1 if scores.dim() == 3 else scores.shape[1]
        made = scores.unflatten(0, (-1, heads)).clone() if scores.dim() == 3 else scores.clone()
        tokens = made.shape[-2]
        query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        for head, (sinks, window) in layer.items():
            away = (query - key >= window) & (key >= sinks)
            # A learned sink is a column more, which everybody sees.
            made[:, head, :, :tokens] = made[:, head, :, :tokens].masked_fill(away, torch.finfo(made.dtype).min)
        return made.reshape(scores.shape)


@contextmanager
def forced_windows(model, attentions, windows):
    """While open, `model` (in eager mode) attends so: {layer: {query head: (sinks, tokens)}}. Without padding."""
    with _watched(_Masked(windows), attentions):
        yield
