"""How a layer without some of its keys uses the caches of transformers.

A layer that owns no keys keeps its values in the cache's key slot, beside a zero-width value slot: an unmodified cache
then reports the right length, and reorders, crops and slides as usual. A layer that owns some of its keys uses both
slots; where a cache gives both as many heads (static and quantised ones), own keys and values lie side by side in the
key slot. New tokens come in by the public `Cache.update`, but for steps of a plain dynamic cache: see `extended`.
"""

from inspect import signature

import torch
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, QuantizedLayer, StaticLayer

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
        if not own:
            return None, (torch.cat([layer.keys, layer.values], dim=-1) if layer.values.numel() else layer.keys)
        if layer.keys.shape[1] == own:
            return layer.keys, layer.values
        states = torch.cat([layer.keys, layer.values], dim=-1) if layer.values.numel() else layer.keys
        return states[:, :own], states[:, own:]


class PackedCache:
    """A cache as a layer sees it that owns fewer keys than it has values."""

    def __init__(self, cache):
        self._cache = cache

    def __getattr__(self, name):
        return getattr(self.__dict__["_cache"], name)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Add (B, own groups, t, D) and (B, G, t, D); return both with all that was cached."""
        layer_class = _layer_class(self._cache, layer_idx)
        if issubclass(layer_class, DynamicLayer) and not issubclass(layer_class, QuantizedLayer):
            return _update(self._cache, key_states, value_states, layer_idx, *args, **kwargs)
        own = key_states.shape[1]
        packed = torch.cat([key_states, value_states], dim=1)
        packed = store(self._cache, packed, layer_idx, *args, **kwargs)
        return packed[:, :own], packed[:, own:]


def store(cache, states, layer_idx, *args, **kwargs):
    """Add states to the cache of a layer, and return all that it holds: (B, ?, t, D) -> (B, ?, S, D)."""
    if not _takes_both_slots(cache, layer_idx):
        return _update(cache, states, states[..., :0], layer_idx, *args, **kwargs)[0]
    half = states.shape[-1] // 2
    return torch.cat(cache.update(states[..., :half], states[..., half:], layer_idx, *args, **kwargs), dim=-1)


def _takes_both_slots(cache, layer_idx):
    """Whether a cache cannot do with an empty value slot; then each slot takes half of every head."""
    if cache.is_compileable:
        return not _STATIC_CACHE_SIZES_SLOTS_ALONE
    return issubclass(_layer_class(cache, layer_idx), QuantizedLayer)


def _layer_class(cache, layer_idx):
    """The class of a layer of the cache, or what it will be when first used."""
    layers = getattr(cache, "layers", None)  # transformers 4 has caches of other makes for mixed models
    if layers is None:
        return object
    return type(layers[layer_idx]) if layer_idx < len(layers) else getattr(cache, "layer_class_to_replicate", object)


def _update(cache, key_states, value_states, layer_idx, *args, **kwargs):
    """As `Cache.update`, without the copy of everything cached that a plain dynamic layer makes at every step."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    plain = type(layer) is DynamicLayer and layer.is_initialized and not getattr(cache, "offloading", False)
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return cache.update(key_states, value_states, layer_idx, *args, **kwargs)
    layer.keys, layer.values = extended(layer.keys, key_states), extended(layer.values, value_states)
    return layer.keys, layer.values


def extended(states, new):
    """torch.cat([states, new], dim=-2), in place where the memory behind states is known to be free.

    From the second step on, the result lies in a larger tensor, with room for a sixteenth more tokens. Who may write
    there is settled by a mark on the result: a list with the number of tokens written so far, which a writer takes out
    and puts back. Results of any other operation (crop, reorder, select) bear no mark; of several caches that hold one
    tensor, only the first to write finds the number of its own tokens there, and the others copy.
    """
    length, total = states.shape[-2], states.shape[-2] + new.shape[-2]
    mark = getattr(states, "_written", None)
    if not new.numel():
        return states.new_empty((*new.shape[:-2], total, new.shape[-1]))
    if mark is None or states.is_inference() > new.is_inference():
        whole = torch.cat([states, new], dim=-2)
        whole._written = [total]
        return whole
    try:
        written = mark.pop()
    except IndexError:  # another thread is writing
        written = None
    if written != length or states.stride(-3) < total * states.stride(-2):
        if written is not None:
            mark.append(written)
        roomy = states.new_empty((*states.shape[:-2], total + total // 16 + 16, states.shape[-1]))
        roomy[..., :length, :] = states
        states, mark = roomy[..., :length, :], []
    whole = states.as_strided((*states.shape[:-2], total, states.shape[-1]), states.stride(), states.storage_offset())
    whole[..., length:, :] = new
    mark.append(total)
    whole._written = mark
    return whole
