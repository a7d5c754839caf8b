"""How a layer without some of its keys uses the caches of transformers.

Values, and the keys that the layer still owns, lie in the cache's key slot, beside a zero-width value slot: an
unmodified cache then reports the right length, and reorders, crops and slides as usual, by the public `Cache.update`.
"""

from inspect import signature

import torch
from transformers.cache_utils import EncoderDecoderCache, QuantizedLayer, StaticLayer

# transformers 4 sizes both slots of a static cache by the keys, so there a zero-width value slot is not possible; nor
# can zero-width tensors be quantised.
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
        states = layer.keys if not layer.values.numel() else torch.cat([layer.keys, layer.values], dim=-1)
        return (states[:, :own] if own else None), states[:, own:]


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
    """Add states to the cache of a layer, and return all that it holds: (B, ?, t, D) -> (B, ?, S, D)."""
    if not _takes_both_slots(cache, layer_idx):
        return cache.update(states, states[..., :0], layer_idx, *args, **kwargs)[0]
    half = states.shape[-1] // 2
    return torch.cat(cache.update(states[..., :half], states[..., half:], layer_idx, *args, **kwargs), dim=-1)


def _takes_both_slots(cache, layer_idx):
    """Whether a cache cannot do with an empty value slot; then each slot takes half of every head."""
    if cache.is_compileable:
        return not _STATIC_CACHE_SIZES_SLOTS_ALONE
    layers = getattr(cache, "layers", ())  # transformers 4 has caches of other makes for mixed models
    return layer_idx < len(layers) and isinstance(layers[layer_idx], QuantizedLayer)
