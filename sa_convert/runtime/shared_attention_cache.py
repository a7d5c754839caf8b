"""How a layer without some of its keys uses the caches of transformers.

What a layer keeps lies in the two slots of its cache layer, in one of four ways. K: own keys, V: values; a cache knows
one number of heads and one width for each slot, and reports the length of the key slot.

| way          | key slot            | value slot    | of which layers                                               |
|--------------|---------------------|---------------|---------------------------------------------------------------|
| apart        | K (V if no own key) | V (width 0)   | those that grow                                               |
| side by side | K V along heads     | width 0       | static ones, made when first written to (transformers 5)      |
| halves       | first half of K V   | second half   | quantised ones; in transformers 4 static ones                 |
| full         | K (V if no own key) | V             | static ones made before (early initialisation), unknown ones  |

The first three save the memory of lost keys. The last one, filled up to the heads of a slot, works in every cache that
can hold keys and values of the base.
New tokens come in by the public `Cache.update`, but for steps of a plain dynamic cache: see `extended`.
"""

from inspect import signature

import torch
from transformers import EncoderDecoderCache, cache_utils


def _classes(*names):
    """Those of transformers' cache layers that this release has."""
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


# A class of another name that inherits the way in which these take new tokens is as good as they are.
_GROW = {layer.update for layer in _classes("DynamicLayer", "DynamicSlidingWindowLayer")}
_STATIC = {layer.update for layer in _classes("StaticLayer", "StaticSlidingWindowLayer")}
_PLAIN = _classes("DynamicLayer")
_QUANTIZED = _classes("BaseQuantizedLayer", "QuantizedLayer")
# transformers 4 sizes both slots of a static cache by the keys.
_SIZES_SLOTS_ALONE = all(
    "value_states" in signature(layer.lazy_initialization).parameters for layer in _classes("StaticLayer")
)


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
        key, value = _put(self._cache, key, value, self._layer, *extra)
        if self._cross and hasattr(self._whole, "is_updated"):
            self._whole.is_updated[self._layer] = True
        return key, value

    def read(self, own, groups):
        """Key (B, own, S, D) or None, and value (B, groups, S, D), as an earlier pass left them. Raises ValueError if
        that was another model's."""
        layer = self._cache.layers[self._layer]
        key, value = layer.keys, layer.values
        if key.shape[1] == own:
            return key, value
        if not value.numel():
            return _split(key, own)
        if 2 * key.shape[1] == own + groups:
            return _split(torch.cat([key, value], dim=1), own)
        if type(layer).update in _GROW or not getattr(layer, "shared_attention", False):
            raise _foreign(self._layer, own, key.shape[1])
        return (key[:, :own] if own else None), value[:, :groups]


class PackedCache:
    """A cache as a layer sees it that owns fewer keys than it has values."""

    def __init__(self, cache):
        self._cache = cache

    def __getattr__(self, name):
        return getattr(self.__dict__["_cache"], name)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Add (B, own groups, t, D) and (B, G, t, D); return both with all that was cached."""
        return _put(self._cache, key_states, value_states, layer_idx, *args, **kwargs)


def _foreign(number, own, found):
    """Why a cache that this model did not fill is refused."""
    return ValueError(
        f"shared_attention: layer {number} of this model caches {own} heads of keys (none where heads reuse attention "
        f"of an earlier layer), but the cache given holds {found or 'tokens'} already: another model filled it, or "
        "prefix tuning did. Let this model fill its cache itself."
    )


def _split(states, own):
    """Own keys (None if there are none) and values, which lie side by side: (B, own + G, S, D)."""
    return (states[:, :own] if own else None), states[:, own:]


def _filled(states, heads):
    """As many heads (B, heads, t, D) as a slot has."""
    missing = heads - states.shape[1]
    return torch.cat([states, states[:, :1].expand(-1, missing, -1, -1)], dim=1) if missing > 0 else states


def _put(cache, key, value, layer_idx, *args, **kwargs):
    """Add key (B, own, t, D) or None, and value (B, G, t, D) of t tokens; return both with all that was cached."""
    own, groups = 0 if key is None else key.shape[1], value.shape[1]
    layers = getattr(cache, "layers", ())  # transformers 4 has caches of other makes for mixed models
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    kind = getattr(cache, "layer_class_to_replicate", None) if layer is None else type(layer)
    way = getattr(kind, "update", None)
    slot = layer.keys.shape[1] if way in _STATIC and layer is not None and layer.is_initialized else 0
    if way in _GROW:
        slots = (key, value) if own else (value, value[..., :0])
        _refuse_foreign(layer, slots, layer_idx, own)
        if own < groups:
            found = _update(cache, *slots, layer_idx, *args, **kwargs)
            return found if own else (None, found[0])
    fresh = way not in _GROW and _is_fresh(layer, layer_idx, own)
    quantized = isinstance(kind, type) and issubclass(kind, _QUANTIZED)
    if fresh and quantized:
        _fit_groups(layer, (own + groups) * value.shape[-1] // 2)
    if own == groups and slot <= groups:
        return cache.update(key, value, layer_idx, *args, **kwargs)
    packed = torch.cat([key, value], dim=1) if own else value
    even = packed.shape[1] % 2 == 0
    if quantized:
        axis = 1 if even else -1
        return _split(torch.cat(cache.update(*packed.chunk(2, axis), layer_idx, *args, **kwargs), dim=axis), own)
    if way in _STATIC and _SIZES_SLOTS_ALONE and (fresh or not layer.values.numel()):
        return _split(cache.update(packed, packed[..., :0], layer_idx, *args, **kwargs)[0], own)
    if way in _STATIC and even and (fresh or slot == packed.shape[1] // 2):
        return _split(torch.cat(cache.update(*packed.chunk(2, 1), layer_idx, *args, **kwargs), dim=1), own)
    slot = max(slot, groups)
    filled = _filled(key if own else value, slot), _filled(value, slot)
    keys, values = cache.update(*filled, layer_idx, *args, **kwargs)
    return (keys[:, :own] if own else None), values[:, :groups]


def _refuse_foreign(layer, slots, layer_idx, own):
    """Raise ValueError where a growing layer holds other heads than this model keeps in it."""
    held = getattr(layer, "keys", None), getattr(layer, "values", None)
    for states, new in zip(held, slots, strict=True):
        filled = states is not None and states.ndim == 4
        if filled and (states.shape[1], states.shape[3]) != (new.shape[1], new.shape[3]):
            raise _foreign(layer_idx, own, held[0].shape[1])


def _is_fresh(layer, layer_idx, own):
    """Whether a layer that does not grow has no slots yet. Slots of the base's shape may be empty, or full of its keys,
    so the first write leaves a mark; without it, ValueError where there are tokens."""
    if layer is None:
        return False
    fresh = not getattr(layer, "is_initialized", True)
    ours = fresh or torch.compiler.is_compiling() or getattr(layer, "shared_attention", False)
    if not ours and int(layer.get_seq_length()) > 0:
        raise _foreign(layer_idx, own, None)
    layer.shared_attention = True
    return fresh


def _fit_groups(layer, numbers):
    """Make groups of quantised numbers so small that the numbers of every token fill some, as they do in the base."""
    size = getattr(layer, "q_group_size", None)
    if size:
        while numbers % size:
            size //= 2
        layer.q_group_size = size


def _update(cache, key_states, value_states, layer_idx, *args, **kwargs):
    """As `Cache.update`, without the copy of everything cached that a plain dynamic layer makes at every step."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    plain = type(layer) in _PLAIN and getattr(layer, "is_initialized", False)
    if not plain or getattr(cache, "offloading", False) or torch.is_grad_enabled() or torch.compiler.is_compiling():
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
