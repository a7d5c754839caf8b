"""How a layer without some of its keys uses the caches of transformers.

Values, and the keys that the layer still owns, lie in the cache's key slot, beside a zero-width value slot: an
unmodified cache then reports the right length, and reorders, crops and slides as usual, by the public `Cache.update`.
"""

from inspect import signature

import torch
from transformers.cache_utils import EncoderDecoderCache, StaticLayer

# transformers 4 sizes both slots of a static cache by the keys, so there a zero-width value slot is not possible.
_STATIC_CACHE_SIZES_SLOTS_ALONE = "value_states" in signature(StaticLayer.lazy_initialization).parameters


class AttentionCache:
    """The part of a model's cache in which one layer keeps its keys and values; own keys may be few or none."""

    def __init__(self, cache, layer, cross=False):
        self._whole, self._layer, self._cross = cache, layer, cross
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if cross else cache.self_attention_cache
        self._cache = cache

    @property
    def is_filled(self):
        """Whether keys and values of the encoder's tokens are there from an earlier pass."""
        return self._cross and bool(getattr(self._whole, "is_updated", {}).get(self._layer))

    def length(self):
        """Tokens in the cache before this pass."""
        return self._cache.get_seq_length(self._layer)

    def update(self, key, value, *extra):
        """Add key (B, own groups, t, D) or None, and value (B, G, t, D); return both with all that was cached."""
        if key is None:
            value = store(self._cache, value, self._layer, *extra)
        elif key.shape[1] == value.shape[1]:
            key, value = self._cache.update(key, value, self._layer, *extra)
        else:
            key, value = PackedCache(self._cache).update(key, value, self._layer, *extra)
        if self._cross and hasattr(self._whole, "is_updated"):
            self._whole.is_updated[self._layer] = True
        return key, value

    def read(self, own, groups):
        """Key (B, own, S, D) or None, and value (B, groups, S, D), as an earlier pass left them."""
        layer = self._cache.layers[self._layer]
        if own == groups:
            return layer.keys, layer.values
        return (layer.keys[:, :own] if own else None), layer.keys[:, own:]


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
