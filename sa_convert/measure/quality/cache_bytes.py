"""Bytes that a model caches for each token, measured on a cache that it has filled."""

from typing import Any

import torch

from sa_convert.models.arguments import caches_in
from sa_convert.models.steps import Steps
from sa_convert.models.task import Decoding


def cache_bytes_per_token(
    model: Any, tokens: torch.Tensor, dtype: torch.dtype | None = None, source: torch.Tensor | None = None
) -> int:
    """Bytes of all cached tensors for one token of one sequence, from a forward pass over `tokens` (T).

    A layer that keeps fewer tokens than it was given (a sliding window) counts by the tokens that it keeps; one that
    keeps a state of fixed size does not count. dtype: count as if the cache had this dtype, for a model that is
    computed in another one than its weights have. source: (S,), what an encoder reads: then the bytes are those for one
    token of the decoder, and in cross-attention for one of the encoder.
    """
    steps = Steps(model, Decoding(tokens, source))
    with torch.inference_mode():
        steps.first(steps.tokens)
    total = 0
    for layer in (layer for part in caches_in(steps.cache) for layer in part.layers):
        if getattr(layer, "keys", None) is None:
            continue  # a state of fixed size
        for states in (layer.keys, layer.values):  # (1, heads, tokens, head size), the last may be 0
            size = dtype.itemsize if dtype is not None else states.element_size()
            total += states.numel() // states.shape[-2] * size
    return total
