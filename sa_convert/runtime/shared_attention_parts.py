"""Caches of parts: some KV groups of a layer are cached by a treatment in a way of its own. Only plans with such a
treatment carry this file.

A layer of a cache becomes one of parts: it holds some KV groups as ever, and beside them what treatments keep of the
others. A treatment that runs after one that took KV groups sees the layer as if it had only those that were left.

Letters in shape comments are those of `modeling_shared_attention`.
"""

from dataclasses import dataclass
from functools import cache
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from transformers import cache_utils

from .modeling_shared_attention import (
    GROW,
    KINDS,
    QUANTIZED,
    STATES,
    STATIC,
    CacheView,
    Call,
    LayerPlan,
    in_front,
    is_exporting,
    is_paged,
    make_slots,
)


def pick(states, places):
    """Those of the heads (B, heads, ...) that are listed, in this order. A view, if they lie side by side."""
    runs = runs_of(tuple(places))
    if len(runs) == 1:
        (at, end), *_ = runs
        return states if end - at == states.shape[1] else states.narrow(1, at, end - at)
    pieces = [states.narrow(1, at, end - at) for at, end in runs]
    return torch.cat(pieces, dim=1) if pieces else states[:, :0]


@torch.compiler.assume_constant_result
def runs_of(places):
    """Numbers as runs of consecutive ones: ((first, last + 1), ...)"""
    return _runs_of(places)


@cache
def _runs_of(places):
    runs = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return tuple(map(tuple, runs))


@dataclass(eq=False)
class Cached:
    """What a cache of parts holds for a layer that attends. layer: that of the cache. start: tokens that it had seen
    before this pass. columns, offset: how many places the mask has, and which the first is. held: the KV groups that
    the layer of the cache holds itself, with their own keys and their values, the new ones included. taken: by KV
    group, the key and the value (B, 1, S, D) of earlier tokens that it has given up just now. plain: how many tokens
    are new, if treatments change nothing yet; otherwise 0."""

    layer: Any
    start: Any
    columns: int
    offset: int
    held: tuple
    keys: Any
    values: Any
    taken: dict
    plain: int = 0


class PartedLayer(cache_utils.CacheLayerMixin):
    """In front of the class of a layer of a cache, some of whose KV groups treatments cache in a way of their own.

    held: the KV groups that are cached as ever, as keys: elsewhere torch.compile may take numbers for symbols. until:
    tokens up to which they stay the same, as far as it is known. parts:
    by treatment, what it keeps of the others. A part has `rows(index or None)`, a copy of itself with these rows of the
    batch; `crop(removed)`, itself without the last tokens, which raises ValueError if what came before them is gone;
    `reset()`, in place, of a static one; `batch`; and `nbytes`. A static layer counts tokens itself, since those of
    transformers 4 do not.
    """

    until = 0

    def __init__(self, layer, groups):
        """layer: an empty one, in whose place this comes, with room for so many KV groups."""
        for name, value in vars(layer).items():
            setattr(self, name, value)
        self.every = self.held = dict.fromkeys(range(groups))
        self.parts, self.count, self.shared_attention = {}, None, True

    def __init_subclass__(cls):
        whole = cls.__bases__[1]
        cls.static, cls.grows = whole.update in STATIC, whole.update in GROW
        cls.by_position = "cache_position" in signature(whole.get_mask_sizes).parameters

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
        if self.grows:
            return start + tokens, limit
        return (None if self.is_sliding else limit), (limit if self.is_sliding else None)

    def advance(self, value, tokens):
        """Count tokens without holding any: as if there were no head. value: (B, G, T, D)."""
        key, value = value[:, :0], value[:, :0, :, :0]  # as `CacheView.put` would lay them
        if not self.is_initialized:
            if self.static:
                make_slots(self, key, value)
            else:
                # Layers that quantise would try it with nothing.
                whole = cache_utils.DynamicLayer if isinstance(self, QUANTIZED) else type(self)
                whole.lazy_initialization(self, *(key, value)[:STATES])
                self.keys, self.values = key[..., :0, :], value[..., :0, :]
        for name in ("cumulative_length", "cumulative_length_int"):
            if hasattr(self, name):
                setattr(self, name, getattr(self, name) + tokens)
        if not self.static:
            pad, more = torch.nn.functional.pad, (0, 0, 0, tokens)
            self.keys, self.values = pad(self.keys, more), pad(self.values, more)

    def let_go(self, plan, held):
        """Hold only these KV groups from now on. Returns, by KV group, the keys and the values of the others."""
        before, self.held = tuple(self.held), dict.fromkeys(held)
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
        return {} if self.static else taken  # a static layer lets go before it has any token, of slots made beforehand

    def get_seq_length(self):
        if self.held or not self.is_initialized or hasattr(self, "cumulative_length"):
            return super().get_seq_length()
        return self.count if self.static else self.keys.shape[-2]

    def reorder_cache(self, beam_idx):
        if self.held or not isinstance(self, QUANTIZED):  # which have quantised nothing
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
            self.until = 0

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


for kind in (*KINDS[0], *KINDS[1]):
    in_front(PartedLayer, kind)


@dataclass(frozen=True)
class View:
    """A layer as one of its treatments sees it: as if it had only the KV groups that treatments before it left. heads:
    the numbers that its query heads have in the layer. own: those that compute their attention, numbered as the
    treatment sees them. places: where the layer's own queries have these; None: they are all of them."""

    heads: tuple
    own: tuple
    places: tuple | None


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


def _left(treatment, layer, heads, group):
    """Of the heads of a layer that reach a treatment, those that it leaves to the next."""
    taken = treatment.takes(layer) if hasattr(treatment, "takes") and treatment.touches(layer) else ()
    return tuple(head for place, head in enumerate(heads) if place // group not in taken)


class PartedPlan(LayerPlan):
    """The plan of a layer. caching: whether a treatment caches KV groups itself. views: the layer as each treatment
    sees it, and as the kernel does at last. plain: tokens up to which treatments change nothing. least: the KV groups
    that a layer of a cache holds at last."""

    def __init__(self, stack, layer, heads, group, reached=()):
        super().__init__(stack, layer, heads, group, reached)
        self.caches = [treatment for treatment in self.treatments if hasattr(treatment, "outgrown")]
        self.caching = bool(self.caches)
        self.plain = self.until(0) if len(self.caches) == len(self.treatments) else 0
        last = _left(reached[-1][0], layer, reached[-1][1], group) if reached else tuple(range(heads))
        self.views = tuple(_view(heads, self.own) for heads in (*(heads for _, heads in reached), last))
        self.least = self.held_after(tuple(range(heads // group)), None, None)

    def until(self, seen):
        """Tokens up to which treatments take no more KV groups, if they have seen so many."""
        return min((treatment.untouched(self.layer, seen) for treatment in self.caches), default=0)

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


@dataclass(eq=False)
class PartedCall(Call):
    """A call as a treatment sees it. cached: what a cache of parts holds, or None. view: the layer as the treatment
    sees it, or the kernel if no treatment is left."""

    cached: Any = None
    view: Any = None
    pick = staticmethod(pick)

    @property
    def heads(self):
        return self.view.heads

    @property
    def own(self):
        return [self.view.heads[place] for place in self.view.own]

    def value_size(self, group):
        """Numbers that a value of a KV group has, by its number in the layer."""
        plan = self.attention.plan
        told = [one.value_size(plan.layer, group) for one in plan.treatments if hasattr(one, "value_size")]
        return min([self.attention.size, *told])

    def seen(self, view, chosen=None):
        """This call, of all heads, as a treatment of this view gets it. chosen: which of the sinks are its own."""
        arguments, chosen = self.arguments, view.places if chosen is None else chosen
        if chosen is not None and arguments.get("s_aux") is not None:
            arguments = {**arguments, "s_aux": arguments["s_aux"][list(chosen)]}
        return PartedCall(self.attention, self.implementation, self.exchange, arguments, self.cached, view)

    def only(self, places):
        """This call for some of the view's own heads, by their places among these."""
        every = range(len(self.view.own)) if self.view.places is None else self.view.places
        return self.seen(View((), tuple(range(len(places))), tuple(every[place] for place in places)), places)

    def kernel(self, query, key, value, mask, group=None, arguments=None, sinks=None):
        name = self.attention.names.sinks
        if sinks is None and self.view.places is not None and name:
            sinks = getattr(self.attention, name)[list(self.view.places)]
        return super().kernel(query, key, value, mask, group, arguments, sinks)


class PartsView(CacheView):
    """A cache as a layer sees it some of whose KV groups treatments cache. codec: makes the codec of any KV groups."""

    def __init__(self, cache, plan, exchange, codec):
        super().__init__(cache, len(plan.own_groups), codec)
        self.plan, self.exchange = plan, exchange

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """As of any `CacheView`, but that only the new keys and values may be returned: the exchange has all."""
        plan, exchange, tokens = self.plan, self.exchange, value_states.shape[-2]
        if exchange is None:
            raise RuntimeError(
                f"shared_attention: layer {plan.layer} has a cache of parts, so it runs within its model only."
            )
        layer = self._parted_layer(layer_idx, plan)
        start = layer.seen(value_states.device)
        sizes = start + tokens, 0
        if layer.static or layer.is_sliding:
            # Until 5.3 positions stand for the number of tokens.
            sizes = layer.get_mask_sizes(torch.arange(tokens) if layer.by_position else tokens)
        if layer.grows and start + tokens <= plan.plain and layer.held == layer.every:
            key_states, value_states = self._append(layer, key_states, value_states, layer_idx, *args, **kwargs)
            cached = Cached(layer, start, *sizes, tuple(layer.held), key_states, value_states, {}, tokens)
        else:
            cached = self._part(layer, sizes, start, key_states, value_states, layer_idx, args, kwargs)
        exchange.notes["cached", plan.place] = cached
        return key_states, value_states

    def _part(self, layer, sizes, start, key, value, number, args, kwargs):
        """Cache what treatments do not cache themselves."""
        plan, tokens = self.plan, value.shape[-2]
        before, taken, keys, values = tuple(layer.held), {}, None, None
        if before == plan.least or (layer.grows and start + tokens <= layer.until):
            held = before
        else:
            held = plan.held_after(before, *layer.reach(start, tokens))
            layer.until = plan.until(start + tokens) if layer.grows and not torch.compiler.is_compiling() else 0
        if held != before:
            if getattr(self.whole, "offloading", False) and layer.is_initialized:  # what it has may be on its way back
                torch.cuda.default_stream(value.device).wait_stream(self.whole.prefetch_stream)
                layer.prefetch()
            taken = layer.let_go(plan, held)
        if held or getattr(self.whole, "offloading", False):
            own = [place for place, group in enumerate(plan.own_groups) if group in held]
            keys, values = pick(key, own) if own else None, pick(value, held)
            if layer.grows and layer.is_initialized and plan.coder is None and 0 < len(own) == len(held):
                keys, values = self._append(layer, keys, values, number, *args, **kwargs)
            else:
                view = CacheView(self.whole, len(own), self.codec(tuple(plan.own_groups[at] for at in own), held))
                keys, values = view.put(keys, values, number, *args, **kwargs)
        else:
            layer.advance(value, tokens)
        if layer.count is not None:
            start = start.clone() if torch.compiler.is_compiling() else int(start)
            layer.count.add_(tokens)
        return Cached(layer, start, *sizes, held, keys, values, taken)

    def _parted_layer(self, number, plan):
        """The layer of the cache with this number, as one of parts. Raises ValueError if it cannot be one."""
        cache, layers = self.whole, getattr(self.whole, "layers", None)
        make = getattr(cache, "layer_class_to_replicate", None)
        while make is not None and len(layers) <= number:
            layers.append(make())
        if not isinstance(layers, list) or number >= len(layers):
            raise ValueError(
                f"shared_attention: layer {plan.layer} caches some KV groups in a way of its own, for which "
                f"{type(cache).__name__} has no room. Choose a dynamic, static or quantised cache; models with other "
                "layers than attention have them since transformers 5.0."
            )
        layer = layers[number]
        if isinstance(layer, PartedLayer):
            return layer
        kind = type(layer)
        if kind.update not in GROW | STATIC and not issubclass(kind, QUANTIZED):
            raise ValueError(
                f"shared_attention: layer {plan.layer} caches some KV groups in a way of its own, which a cache with "
                f"layers of {kind.__name__} cannot do. Choose a dynamic, static or quantised cache."
            )
        if int(layer.get_seq_length()) > 0:
            raise self.foreign(number)
        layers[number] = in_front(PartedLayer, kind)(layer, plan.heads // plan.group)
        return layers[number]


class PartedAttention:
    """Before `TreatedAttention`: attention over caches of parts, and of treatments that take KV groups."""

    plan_class = PartedPlan

    @property
    def packs(self):
        return self.plan.caching or super().packs

    def view(self, cache, exchange):
        plan = self.plan
        if not plan.caching or is_paged(cache) or is_exporting():  # all is held, and windows are masks
            return super().view(cache, exchange)

        def codec(own, held):
            return None if plan.coder is None or exchange is None else plan.coder.codec(self, exchange, own, held)

        return PartsView(cache, plan, exchange, codec)

    def steps(self, call, value, mask):
        plan = self.plan
        if not plan.caching:
            return super().steps(call, value, mask)
        cached = call.exchange.notes.pop(("cached", plan.place), None)
        if cached is None:
            plain = not call.exchange.masked and value.shape[-2] <= plan.plain
        elif plain := cached.plain:
            for treatment in plan.treatments:
                treatment.passed_by(call, mask, cached)
        if plain:
            return [], call
        whole = PartedCall(call.attention, call.implementation, call.exchange, call.arguments, cached)
        *calls, last = (whole.seen(view) for view in plan.views)
        return list(zip(plan.treatments, calls, strict=True)), last

    @staticmethod
    def reach(stack, before):
        if not before:
            return stack
        (treatment, reached), shapes = before[-1], stack.shapes
        heads = {number: _left(treatment, number, reached[number], shapes[number][1]) for number in shapes}
        layers = {
            number: _renumbered(told, heads[number], *shapes[number][:2]) for number, told in stack.layers.items()
        }
        shapes = {number: (len(heads[number]), *shape[1:]) for number, shape in shapes.items()}
        return SimpleNamespace(**{**vars(stack), "heads": heads, "layers": layers, "shapes": shapes})
