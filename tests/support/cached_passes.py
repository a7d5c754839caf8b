"""Logits of a model with a cache, token by token, and without one."""

import torch

from support.tiny_models import with_cache


@torch.no_grad()
def stepwise(model, ids, cache, first=8):
    """Logits of the tokens after the first, one by one with this cache."""
    model(ids[:, :first], **with_cache(model, cache))
    steps = [model(ids[:, at : at + 1], **with_cache(model, cache)).logits for at in range(first, ids.shape[1])]
    return torch.cat(steps, dim=1)


@torch.no_grad()
def whole(model, ids, first=8):
    """The same logits, from one pass."""
    return model(ids, use_cache=False).logits[:, first:]
