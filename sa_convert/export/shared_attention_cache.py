"""How a layer without some of its keys uses the caches of transformers.

Values, and the keys that the layer still owns, lie in the cache's key slot, beside a zero-width value slot: an
unmodified cache then reports the right length, and reorders, crops and slides as usual, by the public `Cache.update`.
"""

from inspect import signature

import torch
from transformers.cache_utils import StaticLayer

# transformers 4 sizes both slots of a static cache by the keys, so there a zero-width value slot is not possible.
_STATIC_CACHE_SIZES_SLOTS_ALONE = "value_states" in signature(StaticLayer.lazy_initialization).parameters


class PackedCache:
    """A cache that stores the few own keys and all values of a layer in its key slot, heads side by side."""

    def __init__(self, cache):
        self._cache = cache

    def __getattr__(self, name):
        return getattr(self.__dict__["_cache"], name)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        # (B, own groups, t, D) and (B, G, t, D) -> (B, own groups + G, S, D)
        own = key_states.shape[1]
        packed = torch.cat([key_states, value_states], dim=1)
        packed = store(self._cache, packed, layer_idx, *args, **kwargs)
        return packed[:, :own], packed[:, own:]


def store(cache, states, layer_idx, *args, **kwargs):
    """Add states to the key slot of a cache, and return all that it holds: (B, ?, t, D) -> (B, ?, S, D)."""
    twice = cache.is_compileable and not _STATIC_CACHE_SIZES_SLOTS_ALONE
    return cache.update(states, states if twice else states[..., :0], layer_idx, *args, **kwargs)[0]
