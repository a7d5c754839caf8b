"""Models whose attention is changed as `config.shared_attention` says. Every converted checkpoint carries this file.

A model is built as its base builds it. Then each attention module that a *treatment* touches gets `TreatedAttention` in
front of its own class, and loses the parameters that its treatments do without. The family's own forward still runs:

    project, normalise, rotate -> cache (CacheView) -> attention function (attend) -> output projection
                                                        each treatment of the layer in turn, at last the kernel

A layer may keep the keys of some KV groups only, or of none. In a cache they lie so (K: own keys, V: values):

    kind of cache                        slot for keys                  slot for values
    grows, or static, made by us         K, or V if there is no K       V, or V of width 0
    quantised                            K, or the first half of V      V, or its second half
    made before this model ran, unknown  K, then copies of its first    V (as many heads as the base has)
                                         head, or V if there is no K

so that every operation of the cache (crop, reorder, offload, ...) holds. A layer that owns no key still runs the
family's forward: `Gone` stands in for its projections, and what comes of that is thrown away.

The layers of one pass share an `Exchange`. It travels with the call and never stays on a module: threads do not meet,
nothing outlives the pass, and a checkpointed layer that is computed again finds the same tensors.

Letters in shape comments: B batch, H query heads, O own query heads, G KV groups, T new tokens, S cached tokens, D head
size. *Own* are heads that compute their attention themselves.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedModel, cache_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MADE_FOR = ("4.57", "5.24")
"""The first and the last release of transformers that this code was tested on."""

EXCHANGE = "shared_attention"
"""The keyword under which an exchange travels, and the name of our attention function."""

MODULES = {
    **{"layers": "model.layers", "attention": "self_attn", "heads": "num_attention_heads", "stacks": ()},
    **{"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "output_outside": False},
    **{"fused": None, "fused_order": "blocks", "transposed": False, "gate": None, "value_limit": None},
    **{"query_norm": None, "key_norm": None, "norm": "shared", "output_norm": None, "sinks": None},
    **{"bidirectional": False, "rotary": "all", "dropout": "attention_dropout", "output_dropout": None},
    **{"exchange": "keyword"},
}
"""What a model's parts are called unless `modules` in its config says otherwise. stacks: of a model with several kinds
of attention, `name`, `layers`, `attention`, `heads`, `cross` and `query_input` (a norm that only queries read)."""


def unlike(what):
    """The message for a transformers in which something that this code needs is not what it was."""
    return (
        f"shared_attention: {what} in transformers {transformers.__version__}. This checkpoint's code was made for "
        f"transformers {MADE_FOR[0]} to {MADE_FOR[1]}: install one of those, or convert the base model again with a "
        "newer sa-convert."
    )


def is_newer():
    """Whether this transformers is newer than the last that this code was tested on."""
    found, tested = (release.split(".")[:2] for release in (transformers.__version__, MADE_FOR[1]))
    return [int("".join(filter(str.isdigit, part)) or 0) for part in found] > [int(part) for part in tested]


def _is_cache(value):
    """Whether this is a cache, which is known by what it does: releases rename arguments."""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")


def is_paged(value):
    """Whether this is the cache of continuous batching, which shares no class with the others."""
    return not isinstance(value, torch.Tensor) and "Paged" in type(value).__name__


def computing_again():
    """Whether a checkpointed layer runs once more. A torch without the name merely keeps more memory for longer."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and not torch.compiler.is_compiling() and task() >= 0


class Exchange:
    """What the layers of one forward pass leave for later ones, by place: (stack, layer).

    Once the pass is over, layers may still run: checkpointed ones, which are computed again, and those that a tool
    replays one by one on inputs that it caught (as GPTQ does). Then loans are kept, and a replayed lender lends anew.
    """

    def __init__(self, stack=None, given=None):
        """stack, given: the module whose pass it is, and the arguments that it was called with, by name."""
        self.over, self.loans, self._inputs, self._mixed, self._again = False, {}, {}, set(), None
        self.stack, self.given, self.notes = stack, given or {}, {}
        self.cached = {}  # by place: what a cache of parts holds for the layer that is about to attend
        cache = next((item for item in self.given.values() if hasattr(item, "get_seq_length")), None)
        self.past = 0 if cache is None else cache.get_seq_length() + 0  # before the pass; a static cache counts on

    def lend(self, place, loan):
        if place not in self.loans or not computing_again():  # the first loan of a checkpointed layer is in the graph
            self.loans[place] = loan
            if self._again not in (None, self):
                self._again.lend(place, loan.apart())

    def again(self):
        """What layers borrow from if they are computed again and cannot keep their exchange: these loans, apart from
        the graph that the layers' inputs are in, which else would keep itself alive."""
        if self._again is None:
            self._again = Exchange(self.stack, self.given)
            self._again.past = self.past
            self._again.over, self._again._again = True, self._again
            self._again.loans = {place: loan.apart() for place, loan in self.loans.items()}
        return self._again

    def borrow(self, place):
        """Raises RuntimeError if nothing was lent, or if it is not clear for which input."""
        self._inputs.pop(place, None)
        if place in self._mixed:
            raise RuntimeError(
                f"shared_attention: layer {place[1]} of one forward pass was replayed on several inputs before the "
                "layers that reuse its attention. Replay each input with the keyword arguments of its own pass, or run "
                "the whole model."
            )
        if place not in self.loans:
            raise RuntimeError(
                f"shared_attention: layer {place[1]} lends its attention to later layers, and has not run in this "
                "pass. Run the whole model, or every layer in order (checkpointing needs use_reentrant=False)."
            )
        return self.loans[place]

    def settle(self, places):
        """Forget loans that no later layer needs. With gradients, a layer that is computed again still needs them."""
        if not self.over and not torch.is_grad_enabled():
            for place in places:
                self.loans.pop(place, None)

    def see(self, place, states):
        """What a lender is about to be replayed on, (B, T, hidden): to notice that one exchange serves several."""
        before = self._inputs.get(place)
        if before is not None and (before.shape != states.shape or not torch.equal(before, states)):
            self._mixed.add(place)
        self._inputs[place] = states


def states_in(args, kwargs):
    """The states (B, T, hidden) that a layer is called with, whatever their name is, or None."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim == 3), None)


def named(module, args, kwargs):
    """All arguments of a call by their names in the module's forward."""
    return {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def _see_input(place, layer, args, kwargs):
    for value in kwargs.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Exchange) and item.over and not computing_again():
                item.see(place, states_in(args, kwargs))


def _classes(*names):
    """Those of transformers' cache layers that this release has."""
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


# A class of another name that inherits the way in which these take new tokens is as good as they are.
_GROW = {layer.update for layer in _classes("DynamicLayer", "DynamicSlidingWindowLayer")}
_STATIC = {layer.update for layer in _classes("StaticLayer", "StaticSlidingWindowLayer")}
_QUANTIZED = _classes("BaseQuantizedLayer", "QuantizedLayer")


class CacheView:
    """A cache as a layer sees it that keeps `own` heads of keys; see the drawing at the top. codec: None, or what makes
    of keys (B, own, T, D) and values what is cached, often in one wide head, and of that keys and values again. parted:
    if treatments cache some KV groups themselves, the layer's plan, the exchange of the pass, and the codec of any KV
    groups."""

    def __init__(self, cache, own, codec=None, parted=None):
        self.cache, self.own, self.codec, self.parted = cache, own, codec, parted

    def __getattr__(self, name):
        return getattr(self.__dict__["cache"], name)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Add (B, own, T, D), not read if own is 0, and (B, G, T, D); return both with all that was cached. Without
        own keys the first is of no meaning. With a cache of parts only the new ones are returned, and the exchange has
        all. Raises ValueError if another model filled the cache."""
        if self.parted is not None:
            self._part(key_states, value_states, layer_idx, args, kwargs)
            return key_states, value_states
        put = self._put_paged if is_paged(self.cache) else self._put
        keys, values = put(key_states if self.own else None, value_states, layer_idx, *args, **kwargs)
        return (values if keys is None else keys), values

    def read(self, layer_idx, groups):
        """Key (B, own, S, D), or of no meaning without own keys, and value (B, groups, S, D), as an earlier pass left
        them. Raises ValueError if that was another model's."""
        layer, own = self.cache.layers[layer_idx], self.own
        key, value = layer.keys, layer.values
        if not own and not value.numel():
            return key, key
        if value.shape[1] != groups or key.shape[1] < own or (type(layer).update in _GROW and key.shape[1] != own):
            raise self._foreign(layer_idx, key.shape[1])
        return key[:, : own or None], value

    def _put_paged(self, key, value, layer_idx, arguments=None, **kwargs):
        """A page has room for a key and a value of every group: the rest is filled up, and nothing is saved."""
        arguments = kwargs.get("kwargs", arguments)
        if arguments.get("block_table") is not None:
            raise NotImplementedError(
                "shared_attention: with a block table the kernel writes keys and values itself, and a layer with "
                "shared attention has keys elsewhere: choose attn_implementation='sdpa' for continuous batching."
            )
        key = value if key is None else self._reduced(key)
        key = nn.functional.pad(key, (0, 0, 0, 0, 0, value.shape[1] - key.shape[1]))
        keys, values = self.cache.update(key, value, layer_idx, kwargs=arguments)
        return (keys[:, : self.own] if self.own else None), values

    def _put(self, key, value, layer_idx, *args, **kwargs):
        own, groups, cache = self.own, value.shape[1], self.cache
        layers = getattr(cache, "layers", ())  # transformers 4 has caches of other makes for mixed models
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        kind = getattr(cache, "layer_class_to_replicate", None) if layer is None else type(layer)
        way = getattr(kind, "update", None)
        coded, packed = (key, value) if self.codec is None else self.codec.encode(key if own else None, value)
        slots = (coded, packed) if own else (packed, packed[..., :0])
        if way in _GROW:
            held = (getattr(layer, "keys", None), getattr(layer, "values", None))
            for states, new in zip(held, slots, strict=True):
                if states is not None and states.ndim == 4 and states[:, :, :0].shape[1:] != new[:, :, :0].shape[1:]:
                    raise self._foreign(layer_idx, held[0].shape[1])
            keys, values = self._append(layer, *slots, layer_idx, *args, **kwargs)
            return self._decoded(keys, values) if own else self._decoded(None, keys)
        fresh = layer is not None and not getattr(layer, "is_initialized", True)
        known = layer is None or fresh or torch.compiler.is_compiling() or hasattr(layer, "shared_attention")
        if not known and int(layer.get_seq_length()) > 0:  # slots of the base's shape may be empty, or full of its keys
            raise self._foreign(layer_idx, None)
        if layer is not None:
            layer.shared_attention = True
        if isinstance(kind, type) and issubclass(kind, _QUANTIZED) and (own or packed.shape[-1] % 2 == 0):
            slots = slots if own else packed.chunk(2, dim=-1)
            self._fit(layer, slots)
            keys, values = cache.update(*slots, layer_idx, *args, **kwargs)
            return self._decoded(*((keys, values) if own else (None, torch.cat([keys, values], dim=-1))))
        if way in _STATIC and fresh:
            self._make(layer, *slots)
        if way in _STATIC and all(
            a[:, :, :0].shape == b[:, :, :0].shape for a, b in zip(slots, (layer.keys, layer.values), strict=True)
        ):
            keys, values = cache.update(*slots, layer_idx, *args, **kwargs)
            return self._decoded(keys, values) if own else self._decoded(None, keys)
        room = layer.keys.shape[1] if way in _STATIC else groups
        slots = [self._filled(states, max(room, groups)) for states in (self._reduced(key) if own else value, value)]
        keys, values = cache.update(*slots, layer_idx, *args, **kwargs)
        return (keys[:, :own] if own else None), values[:, :groups]

    def _part(self, key, value, number, args, kwargs):
        """Cache what treatments do not cache themselves, and leave a `Cached` in the exchange."""
        plan, exchange, codec = self.parted
        if exchange is None:
            raise RuntimeError(
                f"shared_attention: layer {plan.layer} has a cache of parts, so it runs within its model only."
            )
        layer, tokens = self._parted_layer(number, plan), value.shape[-2]
        # Until 5.3 positions stand for the number of tokens.
        columns, offset = layer.get_mask_sizes(torch.arange(tokens) if layer.by_position else tokens)
        start = layer.seen(value.device)
        held, taken, keys, values = plan.held_after(layer.held, *layer.reach(start, tokens)), {}, None, None
        if held != layer.held:
            if getattr(self.cache, "offloading", False) and layer.is_initialized:  # what it has may be on its way back
                torch.cuda.default_stream(value.device).wait_stream(self.cache.prefetch_stream)
                layer.prefetch()
            taken = layer.let_go(plan, held)
        if held or getattr(self.cache, "offloading", False):
            own = [place for place, group in enumerate(plan.own_groups) if group in held]
            view = CacheView(self.cache, len(own), codec(tuple(plan.own_groups[place] for place in own), held))
            keys, values = view._put(pick(key, own) if own else None, pick(value, held), number, *args, **kwargs)
        else:
            layer.advance(value, tokens)
        if layer.count is not None:
            start = start.clone() if torch.compiler.is_compiling() else int(start)
            layer.count.add_(tokens)
        exchange.cached[plan.place] = Cached(layer, start, columns, offset, held, keys, values, taken)

    def _parted_layer(self, number, plan):
        """The layer of the cache with this number, as one of parts. Raises ValueError if it cannot be one."""
        cache, layers = self.cache, getattr(self.cache, "layers", None)
        make = getattr(cache, "layer_class_to_replicate", None)
        while make is not None and len(layers) <= number:
            layers.append(make())
        if is_paged(cache) or not isinstance(layers, list) or number >= len(layers):
            raise ValueError(
                f"shared_attention: layer {plan.layer} caches some KV groups in a way of its own, for which "
                f"{type(cache).__name__} has no room. Choose a dynamic, static or quantised cache; models with other "
                "layers than attention have them since transformers 5.0."
            )
        layer = layers[number]
        if isinstance(layer, PartedLayer):
            return layer
        kind = type(layer)
        if kind.update not in _GROW | _STATIC and not issubclass(kind, _QUANTIZED):
            raise ValueError(
                f"shared_attention: layer {plan.layer} caches some KV groups in a way of its own, which a cache with "
                f"layers of {kind.__name__} cannot do. Choose a dynamic, static or quantised cache."
            )
        if int(layer.get_seq_length()) > 0:
            raise self._foreign(number, None)
        layer.__class__ = parted_class(kind)
        layer.every = layer.held = tuple(range(plan.heads // plan.group))
        layer.parts, layer.count, layer.shared_attention = {}, None, True
        return layer

    def _decoded(self, keys, values):
        return (keys, values) if self.codec is None else self.codec.decode(keys, values)

    def _reduced(self, key):
        """A key as it would come out of a cache that had a place for its codes."""
        return key if self.codec is None else self.codec.reduced(key)

    def _foreign(self, number, found):
        return ValueError(
            f"shared_attention: layer {number} of this model caches {self.own} heads of keys (none where heads reuse "
            f"attention of an earlier layer), but the cache given holds {found or 'tokens'} already: another model "
            "filled it, or prefix tuning did. Let this model fill its cache itself."
        )

    @staticmethod
    def _filled(states, heads):
        missing = heads - states.shape[1]
        return torch.cat([states, states[:, :1].expand(-1, missing, -1, -1)], dim=1) if missing > 0 else states

    @staticmethod
    def _fit(layer, slots):
        """Make groups of quantised numbers so small that those of every token fill some, as they do in the base."""
        size = getattr(layer, "q_group_size", None)
        while size and any(states.shape[1] * states.shape[-1] % size for states in slots):
            layer.q_group_size = size = size // 2

    @staticmethod
    def _make(layer, keys, values):
        """Make the slots of a static layer, each with as many heads as it gets."""
        needed = [keys, values][: len(signature(layer.lazy_initialization).parameters)]
        layer.lazy_initialization(*needed)
        layer.values = values.new_zeros(*values.shape[:2], layer.max_cache_len, values.shape[-1])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(layer.values)

    def _append(self, layer, keys, values, layer_idx, *args, **kwargs):
        """As `Cache.update`, without the copy of everything cached that a plain dynamic layer makes at every step."""
        plain = getattr(type(layer), "whole", type(layer)) in _classes("DynamicLayer") and layer.is_initialized
        lent = getattr(self.cache, "offloading", False) or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not plain or lent:
            return self.cache.update(keys, values, layer_idx, *args, **kwargs)
        layer.keys, layer.values = _grown(layer, "keys", keys), _grown(layer, "values", values)
        return layer.keys, layer.values


def _grown(layer, slot, new):
    """torch.cat([what is in the slot, new], dim=-2), in place if it is what this function put there, and has room.

    From the second step on, the slot is the beginning of a larger tensor, with room for a sixteenth more tokens. Of
    copies of a cache that hold one tensor, the first to write finds its own there, and the others copy.
    """
    states, rooms = getattr(layer, slot), layer.__dict__.setdefault("shared_attention_rooms", {})
    room, last = rooms.pop(slot, (None, None))
    length, total = states.shape[-2], states.shape[-2] + new.shape[-2]
    if not new.numel():
        return states.new_empty((*new.shape[:-2], total, new.shape[-1]))
    if last is not states or states.is_inference() > new.is_inference():
        room, whole = None, torch.cat([states, new], dim=-2)
    else:
        if room is None or room.shape[-2] < total:
            room = states.new_empty((*states.shape[:-2], total + total // 16 + 16, states.shape[-1]))
            room[..., :length, :] = states
        whole = room[..., :total, :]
        whole[..., length:, :] = new
    rooms[slot] = room, whole
    return whole


def pick(states, places):
    """Those of the heads (B, heads, ...) that are listed, in this order. A view, if they lie side by side."""
    runs = runs_of(tuple(places))
    pieces = [states if stop - start == states.shape[1] else states[:, start:stop] for start, stop in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1) if pieces else states[:, :0]


@cache
def runs_of(places):
    """Numbers as runs of consecutive ones: ((first, last + 1), ...)"""
    runs = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return tuple(map(tuple, runs))


@dataclass(frozen=True)
class Cached:
    """What a cache of parts holds for a layer that attends. layer: that of the cache. start: tokens that it had seen
    before this pass. columns, offset: how many places the mask has, and which the first is. held: the KV groups that
    the layer of the cache holds itself, with their own keys and their values, the new ones included. taken: by KV
    group, the key and the value (B, 1, S, D) of earlier tokens that it has given up just now."""

    layer: Any
    start: Any
    columns: int
    offset: int
    held: tuple
    keys: Any
    values: Any
    taken: dict


class PartedLayer(cache_utils.CacheLayerMixin):
    """In front of the class of a layer of a cache, some of whose KV groups treatments cache in a way of their own.

    held: the KV groups that are cached as ever. parts: by treatment, what it keeps of the others. A part has
    `rows(index or None)`, a copy of itself with these rows of the batch; `crop(removed)`, itself without the last
    tokens, which raises ValueError if what came before them is gone; `reset()`, in place, of a static one; `batch`; and
    `nbytes`. A static layer counts tokens itself, since those of transformers 4 do not.
    """

    whole: type
    by_position: bool
    static: bool

    def seen(self, device):
        """How many tokens were cached: of a static layer a tensor, whose address stays."""
        if not self.static:
            return self.get_seq_length()
        if self.count is None:
            self.count = torch.zeros((), dtype=torch.long, device=device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.count)
        return self.count

    def reach(self, start, tokens):
        """How many tokens this layer will hold at the most before the next pass, None: there is no telling; and at the
        most ever, or None."""
        limit = self.max_cache_len if self.static else getattr(self, "sliding_window", None)
        if type(self).update in _GROW:
            return start + tokens, limit
        return (None if self.is_sliding else limit), (limit if self.is_sliding else None)

    def advance(self, value, tokens):
        """Count tokens without holding any: as if there were no head. value: (B, G, T, D)."""
        key, value = value[:, :0], value[:, :0, :, :0]  # as `CacheView._put` would lay them
        if not self.is_initialized:
            if self.static:
                CacheView._make(self, key, value)
            else:
                # Layers that quantise would try it with nothing.
                make = (
                    cache_utils.DynamicLayer if issubclass(self.whole, _QUANTIZED) else self.whole
                ).lazy_initialization
                make(self, *(key, value)[: len(signature(make).parameters) - 1])
                self.keys, self.values = key[..., :0, :], value[..., :0, :]
        for name in ("cumulative_length", "cumulative_length_int"):
            if hasattr(self, name):
                setattr(self, name, getattr(self, name) + tokens)
        if not self.static:
            self.keys, self.values = torch.cat([self.keys, key], dim=-2), torch.cat([self.values, value], dim=-2)

    def let_go(self, plan, held):
        """Hold only these KV groups from now on. Returns, by KV group, the keys and the values of the others."""
        before, self.held = self.held, held
        if not self.is_initialized or getattr(self.keys, "ndim", 0) != 4 or not self.keys.shape[-2]:
            return {}
        own = [group for group in before if group in plan.own_groups]
        key, value = (self.keys, self.values) if own else (None, self.keys)
        taken = {
            group: (pick(key, [own.index(group)]), pick(value, [before.index(group)]))
            for group in before
            if group not in held
        }
        value = pick(value, [before.index(group) for group in held])
        left = [place for place, group in enumerate(own) if group in held]
        self.keys, self.values = (pick(key, left), value) if left else (value, value[..., :0])
        self.__dict__.pop("shared_attention_rooms", None)
        return taken

    def get_seq_length(self):
        if self.held or not self.is_initialized or hasattr(self, "cumulative_length"):
            return super().get_seq_length()
        return self.count if self.static else self.keys.shape[-2]

    def reorder_cache(self, beam_idx):
        if self.held or not isinstance(self, _QUANTIZED):  # which have quantised nothing
            super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        if self.parts:
            rows = next(iter(self.parts.values())).batch
            self._rows(torch.arange(rows).repeat_interleave(repeats))

    def _rows(self, index):
        self.parts = {name: part.rows(index) for name, part in self.parts.items()}

    def crop(self, tokens):
        removed = -tokens if tokens <= 0 else max(int(self.get_seq_length()) - tokens, 0)
        parts = {name: part.crop(removed) for name, part in self.parts.items()}
        super().crop(tokens)
        self.parts = parts

    def reset(self):
        super().reset()
        if self.static:
            self.count = None if self.count is None else self.count.zero_()
            for part in self.parts.values():
                part.reset()
        else:
            self.keys, self.values, self.is_initialized, self.held, self.parts = None, None, False, self.every, {}

    @property
    def nbytes(self):
        """Bytes that the next token needs."""
        whole = [states for states in (self.keys, self.values) if states is not None]
        return sum(states.nbytes for states in whole) + sum(part.nbytes for part in self.parts.values())

    def __copy__(self):
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._rows(None)
        return other


@cache
def parted_class(whole):
    """A class of cache layers with ours in front."""
    members = {
        **{"__module__": __name__, "whole": whole, "static": whole.update in _STATIC},
        "by_position": "cache_position" in signature(whole.get_mask_sizes).parameters,
        "__reduce__": lambda self: (_unparted, (whole,), self.__dict__),
    }
    return type(f"Parted{whole.__name__}", (PartedLayer, whole), members)


def _unparted(whole):
    """A layer of parts, before pickle or copy give it its attributes."""
    ours = parted_class(whole)
    return ours.__new__(ours)


@dataclass(frozen=True)
class View:
    """A layer as one of its treatments sees it: as if it had only the KV groups that treatments before it left. heads:
    the numbers that its query heads have in the layer. own: those that compute their attention, numbered as the
    treatment sees them. places: where the layer's own queries have these; None: they are all of them."""

    heads: tuple
    own: tuple
    places: tuple | None


@dataclass(frozen=True)
class LayerPlan:
    """What one layer has, and which treatments it runs, the first outermost. own, own_groups: query heads, and KV
    groups, that compute their attention, all of them or fewer. views: the layer as each treatment sees it, and as the
    kernel does at last."""

    stack: str
    layer: int
    heads: int
    group: int  # query heads in a KV group
    own: tuple
    treatments: tuple
    views: tuple = ()

    @property
    def place(self):
        return self.stack, self.layer

    @property
    def caching(self):
        """Whether a treatment caches KV groups itself."""
        return any(hasattr(treatment, "outgrown") for treatment in self.treatments)

    def held_after(self, held, total, limit):
        """Of the KV groups that a layer of a cache holds, those that it still does with so many tokens; None: there is
        no telling. The others are cached by treatments. limit: the tokens that it holds at the most, or None."""
        total = None if self.coder is not None else total  # what is cached in another form stays together
        for treatment, view in zip(self.treatments, self.views, strict=False):
            if hasattr(treatment, "outgrown"):
                gone = {
                    view.heads[group * self.group] // self.group
                    for group in treatment.outgrown(self.layer, total, limit)
                }
                held = tuple(group for group in held if group not in gone)
        return held

    @property
    def own_groups(self):
        return tuple(sorted({head // self.group for head in self.own}))

    @property
    def packs(self):
        """A layer that owns every key, all of them as they are, caches as its family does, unless treatments cache some
        of them."""
        return self.caching or len(self.own_groups) < self.heads // self.group or self.coder is not None

    @property
    def coder(self):
        """The treatment that caches keys or values in another form, or None."""
        return next((treatment for treatment in self.treatments if hasattr(treatment, "codec")), None)

    @property
    def whole(self):
        """The treatment that puts something else in the place of the layer's attention as a whole, or None."""
        return next((treatment for treatment in self.treatments if getattr(treatment, "whole", False)), None)


class Gone:
    """In place of a projection whose heads are all gone: gives the one head that a family's forward asks for. It is no
    module, so that tools which look for layers to adapt, quantise or divide find none."""

    def __init__(self, size):
        self.size, self.weight, self.bias = size, torch.empty(0), torch.empty(0)

    def __call__(self, states):
        return nn.functional.pad(states[..., : self.size], (0, max(self.size - states.shape[-1], 0)))


class KernelModule:
    """An attention module as a kernel should see it: the real config, this grouping of heads, and other sinks."""

    def __init__(self, module, group, sinks=None):
        self._module, self.num_key_value_groups, self.config = module, group, module.model_config
        if sinks is not None:
            setattr(self, module.names.sinks, sinks)

    def __getattr__(self, name):
        return getattr(self.__dict__["_module"], name)


class Counted:
    """In front of the class of a cache layer: it keeps nothing of the tokens that it is given, and counts them. Masks
    and positions follow from the length of one layer's cache, whichever that may be."""

    keys = values = None
    is_initialized = True

    def __init__(self, layer, states):
        """layer: the one in whose place it comes. states: (B, T, hidden)."""
        rest = {name: value for name, value in vars(layer).items() if not hasattr(Counted, name)}
        self.__dict__.update(rest, batch_size=len(states), max_batch_size=len(states), cumulative_length=0)
        if self.is_compileable and not self.is_sliding:  # a number would make a graph for every length
            self.cumulative_length = torch.zeros((), dtype=torch.long, device=states.device)
            torch._dynamo.mark_static_address(self.cumulative_length)

    def __reduce__(self):
        return _unmade_layer, (type(self).__bases__[1],), self.__dict__

    @property
    def cumulative_length_int(self):
        return self.cumulative_length

    def update(self, key_states, value_states, *args, **kwargs):
        self._add(key_states.shape[-2])
        return key_states, value_states

    def _add(self, tokens):
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.add_(tokens)
        else:
            self.cumulative_length += tokens

    def get_seq_length(self):
        return self.cumulative_length

    def crop(self, tokens):
        """As this release's other layers take it: the tokens that go, below 0, or the number of those that stay."""
        stay = "max_length" in signature(type(self).__bases__[1].crop).parameters
        self._add(min(0, tokens - self.cumulative_length) if stay and tokens >= 0 else -abs(tokens))

    def reset(self):
        self._add(-self.cumulative_length)

    def _nothing(self, *args, **kwargs):
        """Where others change what they keep."""

    offload = prefetch = lazy_initialization = reorder_cache = _nothing
    batch_repeat_interleave = batch_select_indices = _nothing


@cache
def counted_class(kind):
    """A class of cache layers that keeps nothing."""
    return type(f"Counted{kind.__name__}", (Counted, kind), {"__module__": __name__})


def _unmade_layer(kind):
    """A cache layer that keeps nothing, before pickle or copy give it its attributes."""
    made = counted_class(kind)
    return made.__new__(made)


def count_tokens(cache, number, states, *extra):
    """Tell the cache of a layer that keeps nothing of its tokens (B, T, hidden). Raises ValueError if another model
    filled it. A cache of unknown make, or one that is new to a compiled model, gets one number a token."""
    layers, kind = getattr(cache, "layers", ()), getattr(cache, "layer_class_to_replicate", None)
    while kind is not None and len(layers) <= number:
        layers.append(kind())
    layer = layers[number] if number < len(layers) else None
    if layer is not None and not isinstance(layer, Counted) and not torch.compiler.is_compiling():
        if int(layer.get_seq_length()) == 0:
            layers[number] = counted_class(type(layer))(layer, states)
        elif layer.keys is None or layer.keys.shape[1::2] != (1, 1):
            raise ValueError(
                f"shared_attention: layer {number} of this model has no attention and caches nothing, but the cache "
                "given holds tokens already: another model filled it. Let this model fill its cache itself."
            )
    one = states.new_ones(*states.shape[:2], 1)[:, None]
    cache.update(one, one, number, *extra)


class ConfigView:
    """The model's config, but for the attention function that it names: ours. vLLM asks whether a module would call its
    function, before it gives the module the layer that this function runs: until then the name is vLLM's."""

    def __init__(self, config, module):
        self._config, self._module = config, module

    @property
    def _attn_implementation(self):
        chosen = self._config._attn_implementation
        return EXCHANGE if chosen != "vllm" or hasattr(self._module, "attn") else chosen

    def __getattr__(self, name):
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._config, name)


def _dispatch(module, query, key, value, attention_mask, **arguments):
    return module.attend(query, key, value, attention_mask, arguments, arguments.pop(EXCHANGE, None))


# The only place where transformers looks for an attention function: one name, whatever is treated.
AttentionInterface.register(EXCHANGE, _dispatch)


@dataclass(frozen=True)
class Call:
    """One call of the attention function, as treatments see it. implementation: what the user chose, such as "sdpa".
    arguments: what the family hands to its kernel besides (scaling, window, softcap, sinks, dropout). cached: of a
    cache of parts, or None. view: the layer as the treatment sees it, or the kernel if no treatment is left."""

    attention: Any
    implementation: str
    exchange: Any
    arguments: dict
    cached: Any = None
    view: Any = None
    pick = staticmethod(pick)

    @property
    def layer(self):
        return self.attention.plan.layer

    def seen(self, view):
        """This call, of all heads, as a treatment of this view gets it."""
        return replace(self, view=view, arguments=self._arguments(view.places))

    def only(self, places):
        """This call for some of the view's own heads, by their places among these."""
        every = range(len(self.view.own)) if self.view.places is None else self.view.places
        view = View((), tuple(range(len(places))), tuple(every[place] for place in places))
        return replace(self, view=view, arguments=self._arguments(places))

    def value_size(self, group):
        """Numbers that a value of a KV group has, by its number in the layer."""
        plan = self.attention.plan
        told = [one.value_size(plan.layer, group) for one in plan.treatments if hasattr(one, "value_size")]
        return min([self.attention.size, *told])

    def _arguments(self, places):
        sinks = self.arguments.get("s_aux")
        return self.arguments if sinks is None or places is None else {**self.arguments, "s_aux": sinks[list(places)]}

    def kernel(self, query, key, value, mask, group=None, arguments=None, sinks=None):
        """The family's attention, of heads that lie `group` to a key: output (B, T, H, D), probabilities or None."""
        eager, view = self.implementation == "eager", self.view
        if sinks is None and view is not None and view.places is not None and self.attention.names.sinks:
            sinks = getattr(self.attention, self.attention.names.sinks)[list(view.places)]
        function = self.attention.family_eager if eager else ALL_ATTENTION_FUNCTIONS[self.implementation]
        module, size = KernelModule(self.attention, group or self.attention.plan.group, sinks), value.shape[-1]
        if not eager and key.shape[-1] != size:  # fused kernels take keys and values of one size, or are slow
            wide = max(key.shape[-1], size)
            query, key, value = (nn.functional.pad(each, (0, wide - each.shape[-1])) for each in (query, key, value))
        arguments = self.arguments if arguments is None else arguments
        output, weights = function(module, query, key, value, mask, **arguments)
        return output[..., :size], weights


class TreatedAttention(nn.Module):
    """In front of the attention class of a family: runs the layer's treatments."""

    checkpoint_options: dict = {}
    sizes = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")  # attributes with the head size
    exchange_class, named = Exchange, staticmethod(named)
    unlike, is_paged = staticmethod(unlike), staticmethod(is_paged)

    def prepare(self):
        """Called once, when the module has its plan."""
        self.family_eager = sys.modules[type(self).__bases__[1].__module__].eager_attention_forward

    @classmethod
    def open_exchange(cls, stack, names):
        """Give every forward pass of a stack an exchange: a model that is its own stack does it in its forward."""
        if isinstance(stack, TreatedModel):
            stack.opens_exchange = cls
        else:
            stack.register_forward_pre_hook(cls.begin, with_kwargs=True)
            stack.register_forward_hook(cls.end, with_kwargs=True, always_call=True)

    @staticmethod
    def begin(stack, args, kwargs):
        return args, {EXCHANGE: Exchange(stack, named(stack, args, kwargs)), **kwargs}

    @staticmethod
    def end(stack, args, kwargs, output):
        if EXCHANGE in kwargs:
            kwargs[EXCHANGE].over = True

    def forward(self, *args, **kwargs):
        if self.plan.whole:
            given, position = (*args, *kwargs.values()), kwargs.get("cache_position")
            states, held = states_in(args, kwargs), next(filter(_is_cache, given), None)
            return self.stand_in(states, held, *(() if position is None else ({"cache_position": position},))), None
        if self.plan.packs:
            exchange = kwargs.get(EXCHANGE)
            args = [self._seen(value, exchange) for value in args]
            kwargs = {key: self._seen(value, exchange) for key, value in kwargs.items()}
        outputs = super().forward(*args, **kwargs)
        if len(outputs) != 2:
            raise RuntimeError(unlike(f"{type(self).__name__} returns {len(outputs)} values instead of 2"))
        return outputs

    def _seen(self, value, exchange):
        """An argument as the family's forward gets it."""
        return self.view(value, exchange) if _is_cache(value) or is_paged(value) else value

    def view(self, cache, exchange):
        plan = self.plan

        def codec(own, held):
            return None if plan.coder is None or exchange is None else plan.coder.codec(self, exchange, own, held)

        if plan.caching:
            return CacheView(cache, len(plan.own_groups), parted=(plan, exchange, codec))
        return CacheView(cache, len(plan.own_groups), codec(plan.own_groups, tuple(range(plan.heads // plan.group))))

    def attend(self, query, key, value, mask, arguments, exchange):
        """The attention function. query: (B, O, T, D); key: (B, own groups, S, D), both without meaning if nothing is
        own; value: (B, G, S, D). Returns the output (B, T, H, D), and probabilities (B, H, T, S) or None."""
        implementation = (self.model_config._attn_implementation or "eager").replace("paged|eager", "eager")
        paged = next((name for name, item in arguments.items() if is_paged(item)), None)
        if paged is not None:  # until 5.23 the attention function writes the cache of continuous batching
            key, value = self.view(arguments.pop(paged), exchange).update(key, value, self.plan.layer, arguments)
        if exchange is None and self.plan.treatments:
            raise RuntimeError(
                f"shared_attention: layer {self.plan.layer} lends to other layers, or borrows from them, so it runs "
                "only within its model's forward: run the whole model (checkpointing needs use_reentrant=False)."
            )
        cached = exchange.cached.pop(self.plan.place, None) if exchange is not None and self.plan.caching else None
        whole = View(tuple(range(self.plan.heads)), self.plan.own, None)
        call = Call(self, implementation, exchange, arguments, cached, whole)
        *views, last = self.plan.views
        then = call.seen(last).kernel
        for treatment, view in zip(reversed(self.plan.treatments), reversed(views), strict=True):
            then = partial(treatment.attend, call.seen(view), then=then)
        return then(query, key, value, mask) if self.plan.own else then(None, None, value, mask)

    @staticmethod
    def keep_heads(module, heads, total):
        """Keep these of `total` heads in every parameter of a projection or per-head norm (rows come head by head)."""
        if isinstance(getattr(module, "norms", None), nn.ModuleList):
            module.norms = nn.ModuleList(module.norms[head] for head in heads)
            return
        for name, parameter in list(module.named_parameters(recurse=False)):
            kept = parameter.detach().unflatten(0, (total, -1))[list(heads)].flatten(0, 1)
            setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        if isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]

    @staticmethod
    def shape_of(attention, names, heads):
        """Query heads, query heads in a KV group, and head size of an attention module."""
        size = next(getattr(attention, name) for name in TreatedAttention.sizes if hasattr(attention, name))
        heads, groups = (getattr(attention, name).weight.shape[0] // size for name in (names.query, names.key))
        return heads, heads // groups, size

    def shrink(self):
        """Remove what the layer's lost heads do not need."""
        plan, names = self.plan, self.names
        sides = (
            (names.query, names.query_norm, plan.own, plan.heads),
            (names.key, names.key_norm, plan.own_groups, plan.heads // plan.group),
        )
        for projection, norm, kept, total in sides:
            has_norm = norm and hasattr(self, norm)
            if not kept:
                self.replace(projection, Gone(self.size))
                if has_norm:
                    self.replace(norm, nn.Identity())
            elif len(kept) < total:
                self.keep_heads(getattr(self, projection), kept, total)
                if has_norm and names.norm in ("rows", "list"):
                    self.keep_heads(getattr(self, norm), kept, total)
        if names.sinks:
            sinks = getattr(self, names.sinks).detach()[list(plan.own)]
            self.replace(names.sinks, nn.Parameter(sinks) if plan.own else sinks)

    def stand_in(self, states, held, *extra):
        """What comes in the place of the layer's attention, (B, T, hidden). held: the cache, or None."""
        if held is not None and not is_paged(held):
            count_tokens(held, self.plan.layer, states, *extra)
        return self.plan.whole.output(self, states)

    kept = ()
    """What stays of a module whose attention is gone as a whole."""

    def hollow(self):
        """Remove all parameters and parts, for something else comes in their place."""
        for name in [*dict(self.named_children()), *dict(self.named_parameters(recurse=False))]:
            if name not in self.kept:
                delattr(self, name)

    def replace(self, name, new):
        delattr(self, name)
        setattr(self, name, new)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        """Tensors made for the base model, such as an adapter's, are refused by a sentence."""
        plan, names, errors = self.plan, self.names, others[-1]
        if plan.whole:
            gone = [n for n in state_dict if n.startswith(prefix) and n.removeprefix(prefix) not in self.state_dict()]
            if gone:
                errors.append(f"{gone[0]} does not fit: layer {plan.layer} has no attention, which its base model has.")
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in gone}
            super()._load_from_state_dict(state_dict, prefix, *others)
            return
        own = {prefix + name: parameter.shape for name, parameter in self.named_parameters()}
        parts = {prefix + str(name) for name in (names.query, names.key, names.query_norm, names.key_norm, names.sinks)}
        for name in [name for name in state_dict if name.startswith(prefix) and len(plan.own) < plan.heads]:
            part = prefix + name.removeprefix(prefix).partition(".")[0]
            gone = part in parts and not any(known.startswith(part) for known in own)
            if gone or own.get(name, state_dict[name].shape) != state_dict[name].shape:
                del state_dict[name]
                if not any("reuses attention, so it lacks" in error for error in errors):
                    errors.append(
                        f"{name} does not fit: layer {plan.layer} reuses attention, so it lacks queries and keys that "
                        "its base model has. Train an adapter on the converted model, or merge that of the base into "
                        "the base before it is converted; one of values and outputs alone fits both."
                    )
        super()._load_from_state_dict(state_dict, prefix, *others)


@cache
def treated_class(attention, ours):
    """The attention class of a family with ours in front."""

    @wraps(attention.forward)  # who reads the source of a forward (vLLM, for how it scales scores) finds the family's
    def forward(self, *args, **kwargs):
        return ours.forward(self, *args, **kwargs)

    members = {
        "__module__": __name__,
        "forward": forward,
        # The class is no attribute of its module, so an instance is pickled by what the class is made of.
        "__reduce__": lambda self: (_unmade, (attention, ours), self.__dict__),
    }
    return type(f"Treated{attention.__name__}", (ours, attention), members)


def _unmade(*made_of):
    """A treated attention module, before pickle or copy give it its attributes."""
    ours = treated_class(*made_of)
    return ours.__new__(ours)


def path_in(model, path):
    """Where a model has this part, or None. The path is that in a language model, and may begin with the name of the
    base model: a model without a head lacks that name, and some heads have another."""
    rest, base = path.partition(".")[2], model.base_model_prefix
    return next((name for name in (path, rest, f"{base}.{rest}", f"{base}.{path}") if has_part(model, name)), None)


def has_part(module, path):
    """Whether there is such a part; some layers name a part that they lack, as None."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True


def attentions_of(model, names, stack):
    """The attention modules of a stack, layer by layer; None in layers without softmax attention."""
    layers = model.get_submodule(path_in(model, stack.layers) or stack.layers)
    found = [layer.get_submodule(stack.attention) if has_part(layer, stack.attention) else None for layer in layers]
    return [module if module is not None and hasattr(module, names.fused or names.query) else None for module in found]


def treat(model, described, treatments, ours):
    """Change the attention of a freshly built model, in place.

    described: `shared_attention` of its config. treatments: the classes of those that it may name. ours: the class that
    comes before the family's attention class. Raises ValueError if the plan does not fit the model.
    """
    if described.get("version") != 2:
        raise ValueError("shared_attention: config.json is not of version 2, for which this code was written.")
    names = SimpleNamespace(**{**MODULES, **described.get("modules", {})})
    single = {"name": "", **{key: getattr(names, key) for key in ("layers", "attention", "heads")}}
    stacks = [SimpleNamespace(**{"query_input": None, **stack}) for stack in names.stacks or (single,)]
    plans = {stack.name: {} for stack in stacks}
    for label, layer in described["layers"].items():
        stack, _, number = str(label).rpartition(".")
        if stack not in plans:
            raise ValueError(f"shared_attention: the model has no layer {label}.")
        groups = {None: {layer: {}}} if isinstance(layer, str) else layer
        for group, treated in groups.items():
            for treatment, arguments in treated.items():
                if treatment not in treatments:
                    raise ValueError(f"shared_attention: layer {label}: this checkpoint has no code for {treatment}.")
                chosen = plans[stack].setdefault(treatment, {}).setdefault(int(number), {})
                chosen[None if group is None else int(group)] = arguments
    # An encoder or a decoder may stand alone: what the plan says of the other one is not for this model.
    stacks = [stack for stack in stacks if len(plans) == 1 or path_in(model, stack.layers)]
    active, opened = [], {}
    for stack in stacks:
        stack.path = path_in(model, stack.layers) or stack.layers
        found = _treat_stack(model, names, stack, plans[stack.name], described, treatments, ours)
        active += found
        opened |= {stack.path.rpartition(".")[0]: found} if found else {}
    for path in opened:
        ours.open_exchange(model.get_submodule(path), names)
    # Tensor parallelism gives each process some of the heads, of every layer the same. What treatments cannot divide so
    # is therefore left whole in each process; all else is divided as in the base.
    plan = getattr(model, "tp_plan", None)
    if plan and (names.fused or names.gate or not all(getattr(item, "divisible", False) for item in active)):
        whole = tuple(f"{stack.path}.*.{stack.attention}." for stack in stacks)
        model.tp_plan = {rule: style for rule, style in plan.items() if not rule.startswith(whole)}


def _treat_stack(model, names, stack, chosen, described, treatments, ours):
    """The treatments that run in a stack, ready to; its attention modules get what they need for that."""
    attentions = attentions_of(model, names, stack)
    configs = [getattr(attention, "config", model.config) for attention in attentions]
    shapes = [
        (0, 1, 0) if attention is None else ours.shape_of(attention, names, getattr(config, stack.heads, None))
        for attention, config in zip(attentions, configs, strict=True)
    ]
    active, left = [], {number: tuple(range(heads)) for number, (heads, _, _) in enumerate(shapes)}
    before = {number: [] for number in left}  # the treatments of each layer, and the heads that reach them
    for name in [name for name in treatments if name in chosen]:  # in the order of the literal, the first outermost
        # A model may be made of its first layers alone (`num_hidden_layers`), whose sources come before them.
        layers = {
            number: _renumbered(chosen[name][number], left[number], *shapes[number][:2])
            for number in sorted(chosen[name])
            if number < len(attentions)
        }
        reach = {number: (len(left[number]), *shape[1:]) for number, shape in enumerate(shapes)}
        view = SimpleNamespace(name=stack.name, shapes=reach, heads=dict(left), layers=layers, options=described)
        view.told = {number: groups for number, groups in chosen[name].items() if number < len(attentions)}
        view.sizes = {number: (size, heads // group) for number, (heads, group, size) in enumerate(shapes)}
        treatment = treatments[name](view)
        active.append(treatment)
        for number in filter(treatment.touches, left):
            before[number].append((treatment, left[number]))
            group, taken = shapes[number][1], getattr(treatment, "takes", lambda number: ())(number)
            left[number] = tuple(head for place, head in enumerate(left[number]) if place // group not in taken)
    for number, attention in enumerate(attentions):
        mine = tuple(treatment for treatment, _ in before[number])
        if attention is None or not (mine or (active and names.exchange == "positions")):
            continue
        heads, group, size = shapes[number]
        lost = {
            head
            for treatment, reached in before[number]
            for place, head in enumerate(reached)
            if place not in treatment.own_heads(number)
        }
        own = tuple(head for head in range(heads) if head not in lost)
        views = tuple(_view(reached, own) for reached in (*(reached for _, reached in before[number]), left[number]))
        attention.__class__ = treated_class(type(attention), ours)
        attention.plan = LayerPlan(stack.name, number, heads, group, own, mine, views)
        attention.names, attention.size, attention.model_config = names, size, configs[number]
        attention.config = ConfigView(configs[number], attention)
        if not hasattr(attention, "is_causal"):  # kernels take it for granted if a module does not say
            attention.is_causal = not names.bidirectional or getattr(configs[number], "is_decoder", False)
        layer = model.get_submodule(stack.path)[number]
        if any(number in getattr(treatment, "lenders", ()) for treatment in mine):
            layer.register_forward_pre_hook(partial(_see_input, (stack.name, number)), with_kwargs=True)
        attention.prepare()
        if attention.plan.whole is None and len(own) < heads:
            attention.shrink()
            if not own and stack.query_input:
                _freeze(layer.get_submodule(stack.query_input))
        for treatment in mine:
            if hasattr(treatment, "enter"):
                treatment.enter(attention)
    if getattr(model.config, "_attn_implementation", None) == "vllm":
        for treatment in active:
            if reason := getattr(treatment, "unserved", lambda: None)():
                raise ValueError(f"shared_attention: {reason}: install sa-convert-vllm, or serve another conversion.")
    return active


def _renumbered(groups, left, heads, group):
    """What a treatment is told of KV groups, by their numbers among those of which heads are left. A number that the
    layer does not have stays, for the treatment to refuse."""
    told = {}
    for number, arguments in groups.items():
        if number is None or not 0 <= number * group < heads:
            told[number] = arguments
        elif number * group in left:
            told[left.index(number * group) // group] = arguments
    return told


def _view(heads, own):
    """The view of these heads of a layer that owns those."""
    mine = tuple(place for place, head in enumerate(heads) if head in own)
    places = tuple(own.index(heads[place]) for place in mine)
    return View(heads, mine, None if len(places) == len(own) else places)


def _freeze(module):
    """Make buffers of parameters that nothing reads: files keep them, and no optimizer waits for their gradients."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())


def _opening(forward):
    """The forward of a model class. A model that is itself a stack opens its exchange here and not by a hook: some
    callers (sentence-transformers, serving engines) call `forward` and not the model."""

    @wraps(forward)
    def run(self, *args, **kwargs):
        ours = self.__dict__.get("opens_exchange")
        if ours is None or EXCHANGE in kwargs:
            return forward(self, *args, **kwargs)
        _, kwargs = ours.begin(self, args, kwargs)
        try:
            return forward(self, *args, **kwargs)
        finally:
            ours.end(self, args, kwargs, None)

    return run


class TreatedModel:
    """In front of a model class of transformers. Some of what transformers does for a model it decides by the name of
    its class or by the source code around that: there it looks for `base_class`."""

    base_class: type
    treatments: dict = {}
    attention_class: type = TreatedAttention

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        base = next((base for base in cls.__bases__ if issubclass(base, PreTrainedModel)), None)
        if base is not None and not issubclass(base, TreatedModel):
            cls.base_class, cls.forward = base, _opening(base.forward)
            _register_conversions(cls, base)

    def __init__(self, config, *args, **kwargs):
        if self.base_class is PreTrainedModel:
            raise ImportError(unlike(f"there is no class for {type(self).__name__} to derive from"))
        ours, config.__class__ = type(config), type(config).base_class  # some heads ask an auto class for their base
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = ours
        treat(self, self.described(config), self.treatments, self.attention_class)

    @staticmethod
    def described(config):
        return config.shared_attention

    if is_newer():  # what a later release changed shows anywhere in a pass

        def __call__(self, *args, **kwargs):
            try:
                return super().__call__(*args, **kwargs)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise RuntimeError(unlike(f"{type(error).__name__}: {error}")) from error

    def _get_name(self):
        """By this name, which is also printed, Trainer tells whose labels are to be shifted."""
        return self.base_class.__name__

    @classmethod
    def _can_set_attn_implementation(cls):
        return cls.base_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return cls.base_class._can_set_experts_implementation()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        """As in the base class, without re-entrant checkpointing: it would cut the gradient to queries and keys of
        source layers, which reach reusing layers beside the layer's input. Raises ValueError if it is asked for."""
        options = dict(gradient_checkpointing_kwargs or {})
        if options.setdefault("use_reentrant", False):
            raise ValueError(
                "A model with shared attention needs gradient_checkpointing_kwargs={'use_reentrant': False}: "
                "re-entrant checkpointing loses gradients of attention that is shared between layers."
            )
        options = {**self.attention_class.checkpoint_options, **options}
        super().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)


def _register_conversions(ours, base):
    """Checkpoints keep the tensor names of the base, so transformers 5 must convert them as it does the base's: it
    finds how by model type and by class, in tables that it has this function to add to."""
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:  # transformers 4 loads every checkpoint as it is
        return
    model_type = ours.config_class.model_type
    for known, new in ((model_type.removeprefix("shared_attention_"), model_type), (base.__name__, ours.__name__)):
        conversions = get_checkpoint_conversion_mapping(known)
        if conversions is not None:
            register_checkpoint_conversion_mapping(new, conversions, overwrite=True)


def base_class(name):
    """The class of transformers by this name; one that says so when it is used if this release has none."""
    return getattr(transformers, name, PreTrainedModel)


if transformers.__version__ == "5.3.0" and __name__.startswith("transformers_modules"):
    raise ImportError(
        "transformers 5.3.0 loses the tied weights of every model that comes with code of its own: run "
        "pip install -U transformers."
    )
