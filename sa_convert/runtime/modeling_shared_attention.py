"""Models whose attention is changed as `config.shared_attention` says. Every converted checkpoint carries this file.

A model is built as its base builds it. Then each attention module that a *treatment* touches gets `TreatedAttention` in
front of its own class, and loses the parameters that its treatments do without. The family's own forward still runs:

    project, normalise, rotate -> cache (CacheView) -> attention function (attend) -> output projection
                                                        each treatment of the layer in turn, at last the kernel

A layer may keep the keys of some KV groups only, or of none. In a cache they lie so (K: own keys, V: values):

    kind of cache                        slot for keys                  slot for values
    grows, or static, made by us         K, or V if there is no K       V, or V of width 0
    quantised                            K, or the first half of V      V, or its second half
    made before this model ran, paged,   K, then copies of its first    V (as many heads as the base has)
    or unknown                           head, or V if there is no K

so that every operation of the cache (crop, reorder, offload, ...) holds. A layer that owns no key still runs the
family's forward: `Gone` stands in for its projections, and what comes of that is thrown away.

The layers of one pass share an `Exchange`. It travels with the call and never stays on a module: threads do not meet,
nothing outlives the pass, and a checkpointed layer that is computed again finds the same tensors.

Letters in shape comments: B batch, H query heads, O own query heads, G KV groups, T new tokens, S cached tokens, D head
size. *Own* are heads that compute their attention themselves.
"""

import sys
from dataclasses import dataclass
from functools import partial, wraps
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


def is_paged(value):
    """Whether this is the cache of continuous batching, which shares no class with the others, or a view of it."""
    whole = value.whole if isinstance(value, CacheView) else value
    return not isinstance(whole, (torch.Tensor, dict)) and "Paged" in type(whole).__name__


# Under torch.export what moves from pass to pass is the cache's own, and windows are masks.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def is_cache(value):
    """Whether this is a cache, which is known by what it does: releases rename arguments."""
    return hasattr(value, "update") and hasattr(value, "get_seq_length")


class Over:
    """An object as it is, but for these attributes of it."""

    def __init__(self, whole, **changed):
        self.__dict__.update(changed, whole=whole)

    def __getattr__(self, name):
        if name.startswith("__") or "whole" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["whole"], name)


MADE: dict = {}
"""Classes by the two that they are made of: torch.compile calls those that are there, and none that it sees made."""


def in_front(ours, theirs):
    """The class `theirs` with `ours` in front. It is no attribute of a module, so an instance is pickled by what it is
    made of."""
    if (ours, theirs) not in MADE:
        members = {"__module__": __name__, "__reduce__": lambda self: (_unmade, (ours, theirs), self.__dict__)}
        if hasattr(theirs, "forward"):
            # Who reads the source of a forward (vLLM, for how it scales scores) finds theirs.

            @wraps(theirs.forward)
            def forward(self, *args, **kwargs):
                return ours.forward(self, *args, **kwargs)

            members["forward"] = forward
        MADE[ours, theirs] = type(f"Treated{theirs.__name__}", (ours, theirs), members)
    return MADE[ours, theirs]


def _unmade(ours, theirs):
    """Such an instance, before pickle or copy give it its attributes."""
    made = in_front(ours, theirs)
    return made.__new__(made)


def computing_again():
    """Whether a checkpointed layer runs once more. A torch without the name merely keeps more memory for longer."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and not torch.compiler.is_compiling() and task() >= 0


class Exchange:
    """What the layers of one forward pass leave for later ones, by place: (stack, layer).

    Once the pass is over, layers may still run: checkpointed ones, which are computed again, and those that a tool
    replays one by one on inputs that it caught (as GPTQ does). Then loans are kept, and a replayed lender lends anew.
    """

    def __init__(self, stack, given):
        """stack, given: the module whose pass it is, and the arguments that it was called with, by name."""
        self.stack, self.given, self.over, self.loans, self.inputs, self.mixed = stack, given, False, {}, {}, set()
        self.notes = {}  # what treatments find once in a pass
        self.masked = is_exporting() or any(map(is_paged, given.values()))  # everything is cached as in the base
        cache = next(filter(is_cache, given.values()), None)
        self.past = 0 if cache is None else cache.get_seq_length() + 0  # before the pass; a static cache counts on

    def lend(self, place, loan):
        if place not in self.loans or not computing_again():  # the first loan of a checkpointed layer is in the graph
            self.loans[place] = loan

    def borrow(self, place):
        """Raises RuntimeError if nothing was lent, or if it is not clear for which input."""
        self.inputs.pop(place, None)
        if place in self.mixed:
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


def states_in(args, kwargs):
    """The states (B, T, hidden) that a layer is called with, whatever their name is, or None."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim == 3), None)


def named(module, args, kwargs):
    """All arguments of a call by their names in the module's forward."""
    return {**dict(zip(signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def _see_input(place, layer, args, kwargs):
    """Notice that one exchange serves several inputs: what a lender is about to be replayed on is compared."""
    for item in [item for value in kwargs.values() for item in (value if isinstance(value, tuple) else (value,))]:
        if isinstance(item, Exchange) and item.over and not computing_again():
            before, states = item.inputs.get(place), states_in(args, kwargs)
            if before is not None and (before.shape != states.shape or not torch.equal(before, states)):
                item.mixed.add(place)
            item.inputs[place] = states


def _classes(*names):
    """Those of transformers' cache layers that this release has."""
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


# A class of another name that inherits the way in which these take new tokens is as good as they are.
KINDS = _classes("DynamicLayer", "DynamicSlidingWindowLayer"), _classes("StaticLayer", "StaticSlidingWindowLayer")
GROW, STATIC = ({layer.update for layer in kinds} for kinds in KINDS)
QUANTIZED = _classes("BaseQuantizedLayer", "QuantizedLayer")
STATES = len(signature(cache_utils.DynamicLayer.lazy_initialization).parameters) - 1
"""What layers are told before they make slots: keys and, since 5.0, values. A compiled pass reads no signature."""


class CacheView(Over):
    """A cache as a layer sees it that keeps `own` heads of keys; see the drawing at the top. codec: None, or what makes
    of keys (B, own, T, D) and values what is cached, often in one wide head, and of that keys and values again."""

    def __init__(self, cache, own, codec=None, heads=0):
        """heads: those that a cache of unknown making has room for, if the layer has fewer values."""
        super().__init__(cache, own=own, codec=codec, heads=heads)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Add (B, own, T, D), not read if own is 0, and (B, G, T, D); return both with all that was cached. Without
        own keys the first is of no meaning. Raises ValueError if another model filled the cache."""
        if is_paged(self.whole):
            args, kwargs = (), {"kwargs": kwargs.get("kwargs", args[0] if args else {})}
        keys, values = self.put(key_states if self.own else None, value_states, layer_idx, *args, **kwargs)
        return (values if keys is None else keys), values

    def put(self, key, value, layer_idx, *args, **kwargs):
        """As `update`, with None for keys that there are not."""
        own, groups, cache = self.own, value.shape[1], self.whole
        layers = getattr(cache, "layers", ())  # transformers 4 has caches of other makes for mixed models
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        kind = getattr(cache, "layer_class_to_replicate", None) if layer is None else type(layer)
        way, append = getattr(kind, "update", None), cache.update
        coded, packed = (key, value) if self.codec is None else self.codec.encode(key if own else None, value)
        slots = (coded, packed) if own else (packed, packed[..., :0])
        if way in GROW:
            held = (getattr(layer, "keys", None), getattr(layer, "values", None))
            for states, new in zip(held, slots, strict=True):
                if states is not None and states.ndim == 4 and not _alike(states, new):
                    raise self.foreign(layer_idx, held[0].shape[1])
            append = partial(self._append, layer)
        else:
            fresh = layer is not None and not getattr(layer, "is_initialized", True)
            known = layer is None or fresh or torch.compiler.is_compiling() or hasattr(layer, "shared_attention")
            # Slots of the base's shape may be empty, or full of its keys.
            if not known and int(layer.get_seq_length()) > 0:
                raise self.foreign(layer_idx)
            if layer is not None:
                layer.shared_attention = True
            if isinstance(kind, type) and issubclass(kind, QUANTIZED) and (own or packed.shape[-1] % 2 == 0):
                slots = slots if own else packed.chunk(2, dim=-1)
                states = append(*in_groups(layer, slots), layer_idx, *args, **kwargs)
                keys, values = (each[..., : slot.shape[-1]] for each, slot in zip(states, slots, strict=True))
                return self._decoded(*((keys, values) if own else (None, torch.cat([keys, values], dim=-1))))
            if way in STATIC and fresh:
                make_slots(layer, *slots)
            if way not in STATIC or not all(map(_alike, slots, (layer.keys, layer.values))):
                room = max(layer.keys.shape[1] if way in STATIC else self.heads, groups)
                slots = [_filled(states, room) for states in (self._reduced(key) if own else value, value)]
                keys, values = append(*slots, layer_idx, *args, **kwargs)
                return (keys[:, :own] if own else None), values[:, :groups]
        keys, values = append(*slots, layer_idx, *args, **kwargs)
        return self._decoded(*((keys, values) if own else (None, keys)))

    def _decoded(self, keys, values):
        return (keys, values) if self.codec is None else self.codec.decode(keys, values)

    def _reduced(self, key):
        """A key as it would come out of a cache that had a place for its codes."""
        return key if self.codec is None else self.codec.reduced(key)

    def foreign(self, number, found="tokens"):
        return ValueError(
            f"shared_attention: layer {number} of this model caches {self.own} heads of keys (none where heads reuse "
            f"attention of an earlier layer), but the cache given holds {found} already: another model filled it, or "
            "prefix tuning did. Let this model fill its cache itself."
        )

    def _append(self, layer, keys, values, layer_idx, *args, **kwargs):
        """As `Cache.update`, without the copy of everything cached that a plain dynamic layer makes at every step."""
        plain = getattr(type(layer), "update", None) is cache_utils.DynamicLayer.update and layer.is_initialized
        lent = getattr(self.whole, "offloading", False) or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not plain or lent:
            return self.whole.update(keys, values, layer_idx, *args, **kwargs)
        layer.keys, layer.values = _grown(layer, "keys", keys), _grown(layer, "values", values)
        return layer.keys, layer.values


def _alike(states, others):
    """Whether these are of one shape, but for the number of tokens."""
    return (states.shape[:2], states.shape[3:]) == (others.shape[:2], others.shape[3:])


def _filled(states, heads):
    missing = heads - states.shape[1]
    return torch.cat([states, states[:, :1].expand(-1, missing, -1, -1)], dim=1) if missing > 0 else states


def in_groups(layer, slots):
    """What a layer that quantises gets: groups of numbers, each with a scale and a shift, end where a token does, as in
    the base. They are made smaller for that, or heads filled up with zeros, whichever takes fewer bits."""

    def missing(states, size):
        return -states.shape[-1] % size if states.shape[1] * states.shape[-1] % size else 0

    def bits(size):
        numbers = sum(states.shape[1] * (states.shape[-1] + missing(states, size)) for states in slots)
        return numbers * (getattr(layer, "nbits", 8) + 16 * slots[0].element_size() / size)

    asked = getattr(layer, "q_group_size", 1)  # FP8 has none
    halves = (asked >> n for n in reversed(range(asked.bit_length())) if asked % 2**n == 0)
    layer.q_group_size = size = min(halves, key=bits)
    return [nn.functional.pad(states, (0, missing(states, size))) for states in slots]


def make_slots(layer, keys, values):
    """Make the slots of a static layer, each with as many heads as it gets."""
    layer.lazy_initialization(*(keys, values)[:STATES])
    layer.values = values.new_zeros(*values.shape[:2], layer.max_cache_len, values.shape[-1])
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(layer.values)


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
        whole = room.narrow(-2, 0, total)
        room.narrow(-2, length, total - length).copy_(new)
    rooms[slot] = room, whole
    return whole


NO_CACHE = (torch.Tensor, tuple, bool, Exchange, type(None))
"""What a layer is given besides: to ask these for what a cache has takes long."""


class LayerPlan:
    """What one layer has, and which treatments it runs, the first outermost. own, own_groups: query heads, and KV
    groups, that compute their attention, all of them or fewer. group: query heads in a KV group. coder: the treatment
    that caches keys or values in another form, or None; whole: that which puts something in the place of attention.
    groups: KV groups that the layer has in the base.
    """

    def __init__(self, stack, layer, heads, group, reached=()):
        """reached: each treatment, and the heads of the layer that reach it: numbers of heads in the layer."""
        self.stack, self.layer, self.heads, self.group, self.place = stack, layer, heads, group, (stack, layer)
        self.groups = heads // group
        self.treatments = tuple(treatment for treatment, _ in reached)
        lost = [set(heads) - {heads[own] for own in treatment.own_heads(layer)} for treatment, heads in reached]
        self.own = tuple(head for head in range(heads) if not any(head in some for some in lost))
        self.own_groups = tuple(sorted({head // group for head in self.own}))
        self.coder = next((treatment for treatment in self.treatments if hasattr(treatment, "codec")), None)
        self.whole = next((treatment for treatment in self.treatments if hasattr(treatment, "output")), None)


class ConfigView(Over):
    """The model's config, but for the attention function that it names: ours. vLLM asks whether a module would call its
    function, before it gives the module the layer that this function runs: until then the name is vLLM's."""

    @property
    def _attn_implementation(self):
        chosen = self.whole._attn_implementation
        return EXCHANGE if chosen != "vllm" or hasattr(self.module, "attn") else chosen


class Gone:
    """In place of a projection whose heads are all gone: gives the one head that a family's forward asks for. It is no
    module, so that tools which look for layers to adapt, quantise or divide find none."""

    def __init__(self, size):
        self.size, self.weight, self.bias = size, torch.empty(0), torch.empty(0)

    def __call__(self, states):
        return nn.functional.pad(states[..., : self.size], (0, max(self.size - states.shape[-1], 0)))


def _dispatch(module, query, key, value, attention_mask, **arguments):
    return module.attend(query, key, value, attention_mask, arguments, arguments.pop(EXCHANGE, None))


# The only place where transformers looks for an attention function: one name, whatever is treated.
AttentionInterface.register(EXCHANGE, _dispatch)


GQA = torch.__version__ >= (2, 5)
"""Whether SDPA takes fewer heads of keys than of queries."""

KNOWN = {"scaling", "sliding_window", "position_ids", "cache_position", "use_cache"}
"""Arguments of an attention function of which SDPA's kernel is told no more than the scale, for one token, no mask."""


@dataclass(eq=False)  # not frozen: each step of each layer makes some
class Call:
    """One call of the attention function, as treatments see it. implementation: what the user chose, such as "sdpa".
    arguments: what the family hands to its kernel besides (scaling, window, softcap, sinks, dropout)."""

    attention: Any
    implementation: str
    exchange: Any
    arguments: dict

    @property
    def layer(self):
        return self.attention.plan.layer

    @property
    def heads(self):
        """The heads that a treatment is given, by their numbers in the layer."""
        return range(self.attention.plan.heads)

    @property
    def own(self):
        """Those of them that compute their attention."""
        return self.attention.plan.own

    def _one_token(self, query, key, value, *others):
        """Whether this is one token, of which SDPA's kernel is told nothing but a scale."""
        if self.implementation != "sdpa" or query.shape[2] != 1 or key.shape[-1] != value.shape[-1] or not GQA:
            return False
        told = [item for name, item in self.arguments.items() if name not in KNOWN]
        return not any(isinstance(item, torch.Tensor) or item for item in (*others, *told))

    def kernel(self, query, key, value, mask, group=None, arguments=None, sinks=None):
        """The family's attention, of heads that lie `group` to a key: output (B, T, H, D), probabilities or None."""
        if self._one_token(query, key, value, mask, group, arguments, sinks):
            # What transformers' function comes to: to go through it takes as long as to attend.
            told = {"scale": self.arguments.get("scaling"), "enable_gqa": key.shape[1] != query.shape[1]}
            return nn.functional.scaled_dot_product_attention(query, key, value, **told).transpose(1, 2), None
        attention, eager = self.attention, self.implementation == "eager"
        function = attention.family_eager if eager else ALL_ATTENTION_FUNCTIONS[self.implementation]
        changed = {} if sinks is None else {attention.names.sinks: sinks}
        group, size = group or attention.plan.group, value.shape[-1]
        module = Over(attention, num_key_value_groups=group, config=attention.model_config, **changed)
        if not eager and key.shape[-1] != size:  # fused kernels take keys and values of one size, or are slow
            wide = max(key.shape[-1], size)
            query, key, value = (nn.functional.pad(each, (0, wide - each.shape[-1])) for each in (query, key, value))
        arguments = self.arguments if arguments is None else arguments
        if self.implementation == "vllm" and getattr(attention.attn, "num_heads", query.shape[1]) != query.shape[1]:
            raise ValueError("shared_attention: ranks cannot divide this plan: serve it without tensor parallelism.")
        output, weights = function(module, query, key, value, mask, **arguments)
        if output.ndim == 2:  # an engine's lie head beside head, for all tokens
            output = output.unflatten(-1, (query.shape[1], -1))[None]
        return (output if output.shape[-1] == size else output[..., :size]), weights


class TreatedAttention(nn.Module):
    """In front of the attention class of a family: runs the layer's treatments."""

    checkpoint_options: dict = {}
    sizes = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")  # attributes with the head size
    plan_class, unlike = LayerPlan, staticmethod(unlike)

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

    @property
    def packs(self):
        """A layer that owns every key, all of them as they are, caches as its family does."""
        return len(self.plan.own_groups) < self.plan.groups or self.plan.coder is not None

    def forward(self, *args, **kwargs):
        if self.packs:
            args, exchange = list(args), kwargs.get(EXCHANGE)
            for values, names in ((args, range(len(args))), (kwargs, kwargs)):
                for name in names:
                    value = values[name]
                    if not isinstance(value, NO_CACHE) and (is_cache(value) or is_paged(value)):
                        values[name] = self.view(value, exchange)
        outputs = super().forward(*args, **kwargs)
        if len(outputs) != 2:
            raise RuntimeError(unlike(f"{type(self).__name__} returns {len(outputs)} values instead of 2"))
        return outputs

    def view(self, cache, exchange):
        """A cache as this layer sees it."""
        plan, codec = self.plan, None
        if plan.coder is not None and exchange is not None:
            codec = plan.coder.codec(self, exchange, plan.own_groups, tuple(range(plan.heads // plan.group)))
        return CacheView(cache, len(plan.own_groups), codec, plan.groups)

    def attend(self, query, key, value, mask, arguments, exchange):
        """The attention function. query: (B, O, T, D); key: (B, own groups, S, D), both without meaning if nothing is
        own; value: (B, G, S, D). Returns the output (B, T, H, D), and probabilities (B, H, T, S) or None."""
        implementation = (self.model_config._attn_implementation or "eager").replace("paged|eager", "eager")
        masked = exchange is None or exchange.masked
        paged = next((name for name, item in arguments.items() if is_paged(item)), None) if masked else None
        if paged is not None:  # until 5.23 the attention function writes the cache of continuous batching
            held = arguments.pop(paged)  # as this layer sees it, or as it is
            view = self.view(getattr(held, "whole", held), exchange)
            key, value = view.update(key, value, self.plan.layer, arguments)
        if exchange is None and self.plan.treatments:
            raise RuntimeError(
                f"shared_attention: layer {self.plan.layer} lends to other layers, or borrows from them, so it runs "
                "only within its model's forward: run the whole model (checkpointing needs use_reentrant=False)."
            )
        steps, last = self.steps(Call(self, implementation, exchange, arguments), value, mask)
        then = last.kernel
        for treatment, call in reversed(steps):
            then = partial(treatment.attend, call, then=then)
        return then(query, key, value, mask) if self.plan.own else then(None, None, value, mask)

    def steps(self, call, value, mask):
        """The treatments that run, with the call as each sees it; and as the kernel does at last."""
        return [(treatment, call) for treatment in self.plan.treatments], call

    @staticmethod
    def reach(stack, before):
        """A stack as the next treatment sees it after those before, which are told with the heads that reached them."""
        return stack

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

    def shrink(self, layer, stack):
        """Remove what the layer's lost heads do not need. layer: the module around."""
        plan, names = self.plan, self.names
        sides = (
            (names.query, names.query_norm, plan.own, plan.heads),
            (names.key, names.key_norm, plan.own_groups, plan.heads // plan.group),
        )
        for projection, norm, kept, total in sides:
            norm = norm and hasattr(self, norm) and norm
            if not kept:
                for name in filter(None, (projection, norm)):
                    self.replace(name, Gone(self.size))
            elif len(kept) < total:
                self.keep_heads(getattr(self, projection), kept, total)
                if norm and names.norm in ("rows", "list"):
                    self.keep_heads(getattr(self, norm), kept, total)
        if names.sinks:
            sinks = getattr(self, names.sinks).detach()[list(plan.own)]
            self.replace(names.sinks, nn.Parameter(sinks) if plan.own else sinks)

    def replace(self, name, new):
        delattr(self, name)
        setattr(self, name, new)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        """Tensors made for the base model, such as an adapter's, are refused by a sentence."""
        names, own, told = self.names, dict(self.named_parameters()), False
        lost = {names.query, names.key, names.query_norm, names.key_norm, names.sinks} - {*self._modules, *own}
        for name in [name for name in state_dict if name.startswith(prefix) and len(self.plan.own) < self.plan.heads]:
            mine = name.removeprefix(prefix)
            if mine.partition(".")[0] in lost or (mine in own and own[mine].shape != state_dict[name].shape):
                del state_dict[name]
                if not told:
                    others[-1].append(
                        f"{name} does not fit: layer {self.plan.layer} reuses attention, so it lacks queries and keys "
                        "that its base model has. Train an adapter on the converted model, or merge that of the base "
                        "into the base before it is converted; one of values and outputs alone fits both."
                    )
                told = True
        super()._load_from_state_dict(state_dict, prefix, *others)


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
    shapes = {
        number: (0, 1, 0) if attention is None else ours.shape_of(attention, names, getattr(config, stack.heads, None))
        for number, (attention, config) in enumerate(zip(attentions, configs, strict=True))
    }
    heads, reached = {number: tuple(range(shape[0])) for number, shape in shapes.items()}, []
    for name in [name for name in treatments if name in chosen]:  # in the order of the literal, the first outermost
        # A model may be made of its first layers alone (`num_hidden_layers`), whose sources come before them.
        layers = {number: chosen[name][number] for number in sorted(chosen[name]) if number in shapes}
        sizes = {number: (size, heads // group) for number, (heads, group, size) in shapes.items()}
        view = {"name": stack.name, "shapes": shapes, "heads": heads, "layers": layers, "options": described}
        view = ours.reach(SimpleNamespace(**view, told=layers, sizes=sizes), reached)
        reached.append((treatments[name](view), view.heads))
    for number, attention in enumerate(attentions):
        mine = tuple((treatment, heads[number]) for treatment, heads in reached if treatment.touches(number))
        if attention is None or not (mine or (reached and names.exchange == "positions")):
            continue
        attention.__class__ = in_front(ours, type(attention))
        plan = attention.plan = ours.plan_class(stack.name, number, *shapes[number][:2], mine)
        attention.names, attention.size, attention.model_config = names, shapes[number][2], configs[number]
        attention.config = ConfigView(configs[number], module=attention)
        if not hasattr(attention, "is_causal"):  # kernels take it for granted if a module does not say
            attention.is_causal = not names.bidirectional or getattr(configs[number], "is_decoder", False)
        layer = model.get_submodule(stack.path)[number]
        if any(number in getattr(treatment, "lenders", ()) for treatment in plan.treatments):
            layer.register_forward_pre_hook(partial(_see_input, plan.place), with_kwargs=True)
        attention.prepare()
        if len(plan.own) < plan.heads:
            attention.shrink(layer, stack)
        for treatment in plan.treatments:
            if hasattr(treatment, "enter"):
                treatment.enter(attention)
    active = [treatment for treatment, _ in reached]
    for treatment in active if getattr(model.config, "_attn_implementation", None) == "vllm" else ():
        if reason := getattr(treatment, "unserved", lambda: None)():
            raise ValueError(f"shared_attention: {reason}: install sa-convert-vllm, or serve another conversion.")
    return active


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
            for name in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
                setattr(cls, name, getattr(base, name, None))
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

    def init_continuous_batching(self, *args, **kwargs):
        """As in the base class, which would change to flash attention if it is there. Its kernels write pages by
        themselves and see no masks. Raises NotImplementedError if it was chosen: here, since a worker dies silently."""
        attentions = (module for module in self.modules() if isinstance(module, TreatedAttention))
        fits = all(getattr(module.plan, "whole", None) for module in attentions)
        if not fits and "flash" in self.config._attn_implementation:
            raise NotImplementedError(
                "shared_attention: with flash attention, continuous batching keeps keys where borrowed heads, windows "
                "and low rank cannot reach them: load this model with attn_implementation='sdpa'."
            )
        self._supports_flash_attn = fits and self._supports_flash_attn
        try:
            return super().init_continuous_batching(*args, **kwargs)
        finally:
            del self._supports_flash_attn

    def _get_name(self):
        """By this name, which is also printed, Trainer tells whose labels are to be shifted."""
        return self.base_class.__name__

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
        from transformers import conversion_mapping as tables
    except ImportError:  # transformers 4 loads every checkpoint as it is
        return
    model_type = ours.config_class.model_type
    for known, new in ((model_type.removeprefix("shared_attention_"), model_type), (base.__name__, ours.__name__)):
        conversions = tables.get_checkpoint_conversion_mapping(known)
        if conversions is not None:
            tables.register_checkpoint_conversion_mapping(new, conversions, overwrite=True)


def base_class(name):
    """The class of transformers by this name; one that says so when it is used if this release has none."""
    return getattr(transformers, name, PreTrainedModel)


if transformers.__version__ == "5.3.0" and __name__.startswith("transformers_modules"):
    raise ImportError(
        "transformers 5.3.0 loses the tied weights of every model that comes with code of its own: run "
        "pip install -U transformers."
    )
