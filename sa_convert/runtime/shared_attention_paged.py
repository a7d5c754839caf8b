"""How a layer without some of its keys uses the paged cache of continuous batching (`generate_batch`, serving).

A page has room for a key and a value of every group. A layer that owns fewer keys fills the rest with zeros. One that
owns none writes its values in both places. Nothing is saved there, but every map gives the tokens of `generate`.
"""

import torch


def update_paged(cache, key, value, layer, arguments):
    """Add key (1, own groups, T, D) or None, and value (1, G, T, D), of all requests in a row; return both with all
    that was cached. arguments: the keywords of the call, which say where; the cache changes them in place.

    Raises NotImplementedError if the attention kernel would write the cache itself.
    """
    if arguments.get("block_table") is not None:
        raise NotImplementedError(
            "shared_attention: with a block table the kernel writes keys and values itself, and a layer with shared "
            "attention has keys elsewhere: choose attn_implementation='sdpa' for continuous batching."
        )
    own = 0 if key is None else key.shape[1]
    missing = value.shape[1] - own
    if not own:
        key = value
    elif missing:
        key = torch.cat([key, key.new_zeros(key.shape[0], missing, *key.shape[2:])], dim=1)
    key, value = cache.update(key, value, layer, kwargs=arguments)
    return (key[:, :own] if own else None), value


class PagedCache:
    """A paged cache as a layer sees it that owns fewer keys than it has values."""

    def __init__(self, cache):
        self._cache = cache

    def __getattr__(self, name):
        return getattr(self.__dict__["_cache"], name)

    def update(self, key_states, value_states, layer_idx, kwargs):
        return update_paged(self._cache, key_states, value_states, layer_idx, kwargs)
