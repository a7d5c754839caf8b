"""Bytes that a model caches for each token, measured on a cache that it has filled."""

from typing import TYPE_CHECKING, Any

from sa_convert.run.device import input_device

if TYPE_CHECKING:
    import torch


def cache_bytes_per_token(model: Any, tokens: "torch.Tensor", dtype: "torch.dtype | None" = None) -> int:
    """Bytes of all cached tensors for one token of one sequence, from a forward pass over `tokens` (T).

    A layer that keeps fewer tokens than it was given (a sliding window) counts by the tokens that it keeps. dtype:
    count as if the cache had this dtype, for a model that is computed in another one than its weights have.
    """
    import torch

    with torch.inference_mode():
        cache = model(input_ids=tokens[None].to(input_device(model)), use_cache=True).past_key_values
    total = 0
    for layer in cache.layers:
        for states in (layer.keys, layer.values):  # (1, heads, tokens, head size), the last may be 0
            size = dtype.itemsize if dtype is not None else states.element_size()
            total += states.numel() // states.shape[-2] * size
    return total
