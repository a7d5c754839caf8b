"""The reference for quantised caches: an unmodified base model that attends by a plan, keys and values rounded by hand.

It shares no code with sa_convert, and none with the libraries that quantise: numbers are rounded by the formula of
asymmetric quantisation (KIVI, Liu et al., arXiv 2402.02750), in groups that lie side by side. The base keeps all keys;
what a plan does away with is masked, borrowed or projected.
"""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer, QuantizedCache

GROUP, RESIDUAL, BITS = 8, 4, {"quanto": 4, "hqq": 8}
"""Numbers in a group; new tokens that are not yet rounded; bits by library."""


def made_by(backend, model):
    """A quantised cache of a library; skips the test if it is not installed."""
    return QuantizedCache(backend, model.config, **cache_options(backend))


def cache_options(backend):
    """For a group's numbers to lie side by side. quanto unpacks by a function that it compiles, for a minute or more: a
    line stands in for it."""
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend])
    if backend == "quanto":
        from optimum.quanto.library.extensions import cpp

        if cpp.ext._lib is None:
            cpp.ext._lib = SimpleNamespace(unpack=unpacked)
    axis = {"quanto": 0, "hqq": 1}[backend]
    return {
        "nbits": BITS[backend],
        "q_group_size": GROUP,
        "residual_length": RESIDUAL,
        "axis_key": axis,
        "axis_value": axis,
    }


def unpacked(packed, bits):
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def rounded(states, bits):
    """Each group on a grid of its own, from its least number to its largest."""
    groups = states.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    return (((groups - low) / step).round() * step + low).view_as(states)


def turned(keys, cosines, sines):
    """Keys (B, G, S, D) with halves turned against each other, by cosines and sines (1, S, D)."""
    first, second = keys.chunk(2, dim=-1)
    return keys * cosines[:, None] + torch.cat([-second, first], dim=-1) * sines[:, None]


class Layer(DynamicLayer):
    """What a layer of a cache gives to attention: everything but the newest tokens, rounded now and then.

    bits: None, nothing is rounded. exact: KV groups that never are. codes: {"keys" or "values": {KV group: (basis
    (r, D), offset (D,))}}, whose coordinates are rounded in the place of the states. turns: makes cosines and sines of
    so many tokens.
    """

    def __init__(self, bits, exact, codes, turns):
        super().__init__()
        self.bits, self.exact, self.codes, self.turns = bits, exact, codes, turns
        self.waiting = 0  # tokens that are not rounded

    def update(self, key_states, value_states, *args, **kwargs):
        """Adds what is new; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, made = not self.keys.numel(), []
        waiting = self.waiting + key_states.shape[-2]
        rounds = first or waiting >= RESIDUAL
        for name, states in (("keys", key_states), ("values", value_states)):
            every = states if first else torch.cat([getattr(self, name), states], dim=-2)
            setattr(self, name, self.kept(name, every) if rounds and self.bits else every)
            made.append(every)
        self.waiting = 0 if rounds else waiting
        return tuple(made)

    def kept(self, name, states):
        found = []
        for group, one in enumerate(states.split(1, dim=1)):
            if group in self.exact:
                found.append(one)
            elif group in self.codes[name]:
                basis, offset = self.codes[name][group]
                cos, sin = self.turns(one) if name == "keys" else (torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
                codes = rounded((turned(one, cos, -sin) - offset) @ basis.T, self.bits)
                found.append(turned(codes @ basis + offset, cos, sin))
            else:
                found.append(rounded(one, self.bits))
        return torch.cat(found, dim=1)


class ByHand:
    """A base model that attends by a plan. found: what `low_rank_models.convert` made. windows: {layer: {KV group:
    (sinks, tokens)}}. borrowed: {layer: {query head: (source layer, head)}}. dropped: layers without attention."""

    def __init__(self, found, windows, borrowed, dropped):
        self.found, self.windows, self.borrowed, self.dropped = found, windows, borrowed, dropped
        self.base, self.probabilities = found.base, {}
        AttentionInterface.register("by_hand", self.attend)

    def attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        number, (heads, tokens), total = module.layer_idx, query.shape[1:3], key.shape[2]
        size = heads // key.shape[1]
        key, value = (states.repeat_interleave(size, dim=1) for states in (key, value))
        ago = torch.arange(total - tokens, total)[:, None] - torch.arange(total)
        scores = (query @ key.transpose(-2, -1) * scaling).masked_fill(ago < 0, -torch.inf)
        for group, (sinks, reach) in self.windows.get(number, {}).items():
            unseen = (ago >= reach) & (torch.arange(total) >= sinks)
            scores[:, group * size : (group + 1) * size].masked_fill_(unseen, -torch.inf)
        seen = scores.softmax(-1)
        for head, (layer, other) in self.borrowed.get(number, {}).items():
            seen[:, head] = self.probabilities[layer][:, other]
        self.probabilities[number] = seen
        return (seen @ value).transpose(1, 2).contiguous(), None

    @contextmanager
    def open(self):
        """While open, the base attends by the plan."""
        from support.low_rank_models import projected
        from support.whole_layers import overruled

        before = self.base.config._attn_implementation
        with ExitStack() as stack:
            stack.enter_context(projected(self.found))
            stack.enter_context(overruled(self.base, self.found.family, dict.fromkeys(self.dropped)))
            self.base.config._attn_implementation = "by_hand"
            stack.callback(setattr, self.base.config, "_attn_implementation", before)
            yield self.base

    def cache(self, bits):
        """bits: None, nothing is rounded."""
        layers = []
        for number in range(self.base.config.num_hidden_layers):
            codes = {}
            for name, ranks in (("keys", self.found.ranks), ("values", self.found.values)):
                bases = {
                    group: self.found.bases.basis(number, group, rank, name)
                    for group, rank in ranks.get(number, {}).items()
                }
                codes[name] = {group: (one.basis, one.offset) for group, one in bases.items()}
            layers.append(Layer(bits, tuple(self.windows.get(number, ())), codes, self.turns))
        return Cache(layers=layers)

    def turns(self, keys):
        embedding, positions = self.base.model.rotary_emb, torch.arange(keys.shape[-2])[None]
        kinds = {"layer_type": "full_attention"} if "gemma3" in self.base.config.model_type else {}
        return embedding(keys, positions, **kinds)


def bytes_of(layer):
    """Bytes of what a layer of a quantised cache holds in few bits, of a library's own making."""
    total = 0
    for states in (layer._quantized_keys, layer._quantized_values):
        if isinstance(states, tuple):  # HQQ's numbers, and what tells how they are to be read
            total += states[0].nbytes + states[1]["scale"].nbytes + states[1]["zero"].nbytes
        else:
            total += states._data._data.nbytes + states._scale.nbytes + states._shift.nbytes
    return total
