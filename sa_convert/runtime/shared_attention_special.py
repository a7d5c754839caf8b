"""Attention of families whose own forward cannot run with fewer heads, or does not hand the exchange on. Only their
checkpoints carry this file. `PlainAttention` does what such a forward does; the other classes do what is special.

Letters in shape comments are those of `modeling_shared_attention`.
"""

import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass, replace
from inspect import Parameter, signature

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import EncoderDecoderCache

from .modeling_shared_attention import EXCHANGE, GROW, Exchange, is_paged, named

ROLES = {
    "cache": ("cache", "past_key_values", "past_key_value", "layer_past"),
    "mask": ("attention_mask", "mask"),
    "positions": ("position_embeddings",),
    "position_ids": ("position_ids",),
    "cache_position": ("cache_position",),
    "source": ("key_value_states",),
    "bias": ("position_bias",),
    "alibi": ("alibi",),
    "residual": ("residual",),
    "output_attentions": ("output_attentions",),
}
"""What an attention module may take, and the spellings that releases used, the newest first. source: the encoder's
states, for cross-attention; bias: of T5's relative positions; positions: cosines and sines."""


class Arguments:
    """The arguments of an attention class by what they are, since releases rename them: by known spelling, annotation,
    or the word in the name. `roles` says under which name its forward takes each.

    needs: the roles that must be there. unlike: makes the message. Raises RuntimeError if one is not.
    """

    def __init__(self, attention, needs, unlike):
        every = list(signature(attention.forward).parameters.values())[1:]
        named = [item for item in every if item.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        self.names = [item.name for item in named]
        self.roles, self._spellings = {"states": self.names[0]}, {}
        known = {name for names in ROLES.values() for name in names}
        for role, spellings in ROLES.items():
            told = [item.name for item in named if item.name not in known and _tells(role, item)]
            found = [name for name in (*spellings, *told) if name in self.names and name not in self.roles.values()]
            if found:
                self.roles[role] = found[0]
                self._spellings.update({name: found[0] for name in spellings if name not in self.names})
        if missing := [role for role in needs if role not in self.roles]:
            taken = ", ".join(self.names)
            raise RuntimeError(unlike(f"{attention.__name__} takes ({taken}), none of which is the {missing[0]}"))

    def by_name(self, args, kwargs):
        """All arguments of a call under the names of the signature, older spellings of it included. The cache of
        continuous batching stays what it is called: until 5.23 it comes beside one that is None."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for other in [name for name in given if name in self._spellings and not is_paged(given[name])]:
            value = given.pop(other)
            given.setdefault(self._spellings[other], value)
        return given

    def by_role(self, given):
        """Arguments by name as a `Given`, which has None for what the family or the call does not have."""
        rest = {name: value for name, value in given.items() if name not in self.names}
        exchange = rest.pop(EXCHANGE, None)
        return Given({role: given.get(name) for role, name in self.roles.items()}, exchange, rest)


class Given:
    """What an attention module was called with: by role, the exchange, and the rest, for the attention function."""

    def __init__(self, roles, exchange, rest):
        self.roles, self.exchange, self.rest = roles, exchange, rest

    def __getattr__(self, role):
        return self.__dict__["roles"].get(role)


def _tells(role, parameter):
    """Whether an argument of unknown name can only be this one, by its annotation or the word in its name."""
    words, annotation = parameter.name.split("_"), str(parameter.annotation)
    if "encoder" in words or "head" in words:
        return False
    if role == "cache":
        return "Cache" in annotation or ("cache" in words and words[0] != "use")
    if role == "positions":
        return "tuple[torch.Tensor, torch.Tensor]" in annotation
    if role == "position_ids":
        return "position" in parameter.name and "LongTensor" in annotation
    return role in words


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, for families whose own does not take any number of heads.

    query: (B, H, T, D); key, value: (B, G, S, D). Returns the output (B, T, H, D) and probabilities (B, H, T, S).
    Raises NotImplementedError for what it does not compute.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(
            module.unlike(f"attention takes {' and '.join(unknown)}, which this family's did not,")
        )
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PlainAttention:
    """Comes before `TreatedAttention`: attention as most families do it, for any number of own heads."""

    needs = ()  # roles beside the usual ones that the family's forward must have
    own_eager = False  # whether plain attention stands in for the family's eager function

    def prepare(self):
        names, attention = self.names, type(self).__bases__[1]
        module = sys.modules[attention.__module__]
        eager = getattr(module, "eager_attention_forward", eager_attention)
        self.family_eager = eager_attention if names.fused or self.own_eager else eager
        self.rotate = getattr(module, "apply_rotary_pos_emb", None)
        rotates = names.rotary != "none"
        if rotates and self.rotate is None:
            raise RuntimeError(self.unlike(f"the module of {attention.__name__} has no apply_rotary_pos_emb"))
        needs = ("mask", *self.needs, *(() if names.bidirectional else ("cache",)))
        needs += ("positions",) if names.exchange == "positions" or (rotates and not self.own_eager) else ()
        self.arguments = Arguments(attention, needs, self.unlike)

    def forward(self, *args, **kwargs):
        given = self.arguments.by_name(args, kwargs)
        if self.names.exchange == "positions":
            name = self.arguments.roles["positions"]
            *positions, given[EXCHANGE] = given[name]
            given[name] = tuple(positions)
        if not self.plan.treatments:
            given.pop(EXCHANGE, None)
            return super().forward(**given)
        call = self.arguments.by_role(given)
        return self.run_whole(call) if self.plan.whole else self.run(call)

    def run_whole(self, call):
        """What the family's forward returns, with something else in the place of attention."""
        return self.stand_in(call.states, call.cache, *self.extra(call)), None

    def run(self, call):
        """What the family's forward does. Families with steps of their own override it."""
        return self.plain(call, call.mask, call.positions)

    def plain(self, call, mask, positions):
        query, key, value, gate = self.project(call.states)
        names = self.names
        if query is not None:
            if names.query_norm and hasattr(self, names.query_norm):
                query, key = getattr(self, names.query_norm)(query), getattr(self, names.key_norm)(key)
            query, key = self.turn(query, key, positions)
        if call.cache is not None:
            rest = (call.rest,) if is_paged(call.cache) else self.extra(call)
            key, value = self.view(call.cache, self.exchange_of(call)).update(key, value, self.plan.layer, *rest)
        output, weights = self.attend_call(query, key, value, mask, call)
        return self.finish(output, call.states, gate), weights

    def view(self, cache, exchange):
        """Of a cache that also keeps cross-attention, which decoders made of encoders get: its part for this one."""
        return super().view(getattr(cache, "self_attention_cache", cache), exchange)

    @staticmethod
    def exchange_of(call):
        return call.exchange or current_exchange()

    def extra(self, call):
        """What a cache's update takes besides: in transformers 4 the positions, for static caches; later it counts."""
        return () if call.cache_position is None else ({"cache_position": call.cache_position},)

    def attend_call(self, query, key, value, mask, call):
        """As `attend`, with what a family's forward would have handed to the attention function."""
        arguments = dict(call.rest)
        if query is not None:
            names = (self.names.dropout, "attention_dropout", "attn_dropout")
            rate = next((getattr(self, name) for name in names if hasattr(self, name)), 0.0)
            rate = rate.p if isinstance(rate, nn.Dropout) else rate
            arguments |= {"scaling": self.scale(), "dropout": rate if self.training else 0.0}
        return self.attend(query, key, value, mask, arguments, self.exchange_of(call))

    def scale(self):
        return getattr(self, "scaling", self.size**-0.5)

    def split(self, states):
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return states.view(*states.shape[:-1], -1, self.size).transpose(1, 2)

    def project(self, states, source=None):
        """Query (B, O, T, D), key (B, own groups, S, D), both None if nothing is own, value (B, G, S, D), and the
        gate (B, T, H * D) or None. source: what keys and values are made of, if it is not the same.

        A layer that lost heads holds own queries, own keys and all values in its fused projection, and own queries,
        then all gates, in a gated one. Another has the order of its family."""
        names, plan = self.names, self.plan
        own, groups, whole = len(plan.own), plan.heads // plan.group, len(plan.own) == plan.heads
        gate = None
        if names.fused:
            states = getattr(self, names.fused)(states)
            if names.fused_order == "groups" and whole:
                states = states.view(*states.shape[:-1], groups, plan.group + 2, self.size)  # (B, T, G, ., D)
                query = states[..., :-2, :].flatten(2, 3)
                return *(part.transpose(1, 2) for part in (query, states[..., -2, :], states[..., -1, :])), None
            sizes = [own * self.size, len(plan.own_groups) * self.size, groups * self.size]
            query, key, value = (self.split(part) if part.shape[-1] else None for part in states.split(sizes, dim=-1))
            return query, key, value, None
        source = states if source is None else source
        value = self.split(getattr(self, names.value)(source))
        query = getattr(self, names.query)(states) if own or names.gate else None
        if names.gate and whole:
            pairs = query.view(*states.shape[:-1], plan.heads, 2, self.size)  # (B, T, H, 2, D)
            query, gate = pairs[..., 0, :].flatten(-2), pairs[..., 1, :].flatten(-2)
        elif names.gate:
            query, gate = query.split([own * self.size, plan.heads * self.size], dim=-1)
        if not own:
            return None, None, value, gate
        return self.split(query), self.split(getattr(self, names.key)(source)), value, gate

    def turn(self, query, key, positions):
        """Rotate queries and keys by their positions, in families that do."""
        if positions is None:
            return query, key
        cos, sin = positions
        width = cos.shape[-1]  # partial rotary: the first `width` of D turn
        turned = self.rotate(query[..., :width], key[..., :width], cos, sin)
        if width == self.size:
            return turned
        return tuple(torch.cat([a, b[..., width:]], dim=-1) for a, b in zip(turned, (query, key), strict=True))

    def finish(self, attention, states, gate=None):
        """(B, T, H, D) -> (B, T, hidden)"""
        names = self.names
        output = attention.reshape(*states.shape[:-1], -1).contiguous()
        output = output if gate is None else output * torch.sigmoid(gate)
        if not names.output_outside:
            output = getattr(self, names.output)(output)
        if names.output_dropout:
            output = getattr(self, names.output_dropout)(output)
        return nn.functional.dropout(output, p=getattr(self, "residual_dropout", 0.0), training=self.training)

    @classmethod
    def shape_of(cls, attention, names, heads):
        if not names.fused:
            heads, _, size = super().shape_of(attention, names, heads)
            heads = heads // 2 if names.gate else heads
            return heads, heads * size // getattr(attention, names.key).weight.shape[0], size
        size = next(getattr(attention, name) for name in cls.sizes if hasattr(attention, name))
        groups = (getattr(attention, names.fused).weight.shape[1 if names.transposed else 0] // size - heads) // 2
        return heads, heads // groups, size

    def shrink(self, layer, stack):
        plan, names = self.plan, self.names
        if not (names.fused or names.gate):
            return super().shrink(layer, stack)
        groups = plan.heads // plan.group
        if names.gate:
            _keep_first(getattr(self, names.query), (len(plan.own) + plan.heads) * self.size, 0)
            if not plan.own:
                delattr(self, names.key)
            elif len(plan.own_groups) < groups:
                self.keep_heads(getattr(self, names.key), plan.own_groups, groups)
        else:
            kept = (len(plan.own) + len(plan.own_groups) + groups) * self.size
            _keep_first(getattr(self, names.fused), kept, 1 if names.transposed else 0)
        for norm in (names.query_norm, names.key_norm):
            if norm and not plan.own and hasattr(self, norm):
                delattr(self, norm)


def _keep_first(module, kept, axis):
    """Keep so many rows of a projection; which ones does not matter, since the checkpoint fills them."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        cut = parameter.detach().narrow(axis if parameter.ndim > 1 else 0, 0, kept).clone()
        setattr(module, name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features = kept
    elif hasattr(module, "nf"):  # Conv1D
        module.nf = kept


# Families that hand no keyword on have the exchange of a pass in the thread that it runs in (Dynamo traces that, but no
# context variable). `open`: (exchange, what was open before it) of the innermost pass, or None.
_THREAD = threading.local()

# What a checkpointed layer borrows from if it is computed again outside its stack, maybe in another thread, but on the
# same tensor: by the states that it was called with, which whoever checkpoints it keeps.
_AGAIN = WeakTensorKeyDictionary()


class ThreadedExchange(Exchange):
    """An exchange with another one for layers that are computed again."""

    other = None

    def lend(self, place, loan):
        super().lend(place, loan)
        if self.other not in (None, self) and self.loans[place] is loan:
            self.other.lend(place, apart(loan))

    def again(self):
        """What layers borrow from if they are computed again and cannot keep their exchange: these loans, apart from
        the graph that the layers' inputs are in, which else would keep itself alive."""
        if self.other is None:
            self.other = ThreadedExchange(self.stack, self.given)
            self.other.past, self.other.over, self.other.other = self.past, True, self.other
            self.other.loans = {place: apart(loan) for place, loan in self.loans.items()}
        return self.other


def apart(loan):
    """The same numbers outside the graph, for autograd to save as many tensors of them as the first time."""
    if isinstance(loan, torch.Tensor):
        return loan.detach().requires_grad_(loan.requires_grad)
    if isinstance(loan, list):
        return [apart(part) for part in loan]
    parts = {name: apart(part) for name, part in vars(loan).items()} if is_dataclass(loan) else {}
    return replace(loan, **parts) if parts else loan


def current_exchange():
    """That of the innermost pass that this thread is in."""
    inner = getattr(_THREAD, "open", None)
    return None if inner is None else inner[0]


def _enter(exchange):
    _THREAD.open = exchange, getattr(_THREAD, "open", None)


def _leave(*_):
    if getattr(_THREAD, "open", None) is not None:
        _THREAD.open = _THREAD.open[1]


@contextmanager
def _within(exchange):
    _enter(exchange)
    try:
        yield
    finally:
        _leave()


def _enter_layer(layer, args, kwargs):
    exchange = current_exchange()
    if not torch.compiler.is_compiling():
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim == 3)
        states = next(given, None)
        if exchange is None and states is not None:
            exchange = _AGAIN.get(states)
        elif states is not None and torch.is_grad_enabled():
            _AGAIN[states] = exchange.again()
    _enter(exchange)


def _checkpoint_contexts():
    """For torch.utils.checkpoint around the forward of a layer, which hooks do not see."""
    exchange = current_exchange()
    return nullcontext(), _within(None if exchange is None else exchange.again())


def _append_to_positions(rotary, args, output):
    exchange = current_exchange()
    return (*output, exchange)


class ThreadedAttention(PlainAttention):
    """Of families that hand no keyword on: exchanges are found by thread, or travel beside the rotary embeddings."""

    checkpoint_options = {"context_fn": _checkpoint_contexts}

    @classmethod
    def open_exchange(cls, stack, names):
        super().open_exchange(stack, names)
        if names.exchange == "positions":
            stack.rotary_emb.register_forward_hook(_append_to_positions)
            return
        for module in stack.modules():  # every module around attention may be checkpointed
            if module is not stack and any(isinstance(part, ThreadedAttention) for part in module.modules()):
                module.register_forward_pre_hook(_enter_layer, with_kwargs=True)
                module.register_forward_hook(_leave, always_call=True)

    @classmethod
    def begin(cls, stack, args, kwargs):
        _enter(ThreadedExchange(stack, named(stack, args, kwargs)))
        return args, kwargs

    @staticmethod
    def end(stack, args, kwargs, output):
        exchange = current_exchange()
        if exchange is not None:
            exchange.over = True
        _leave()


class GPT2Attention(PlainAttention):
    """GPT-2: how scores are scaled is a matter of its config."""

    own_eager = True

    def scale(self):
        scaling = self.size**-0.5 if self.scale_attn_weights else 1.0
        return scaling / (self.layer_idx + 1) if self.scale_attn_by_inverse_layer_idx else scaling


class FalconAttention(ThreadedAttention):
    """Falcon: rotary embeddings or ALiBi."""

    needs, own_eager = ("alibi", "positions"), True

    def run(self, call):
        mask, positions = call.mask, call.positions
        if call.alibi is not None:
            positions = None
            if (self.model_config._attn_implementation or "eager") == "eager":
                # The mask holds ALiBi as well: with eager attention Falcon adds it twice, and so its models do here.
                mask = call.alibi.view(call.states.shape[0], self.plan.heads, 1, -1) * self.size**-0.5 + mask
        return self.plain(call, mask, positions)


class BloomAttention(ThreadedAttention):
    """BLOOM: ALiBi, and the residual is added here."""

    needs, own_eager = ("alibi", "residual"), True

    def run(self, call):
        mask = call.alibi.view(call.states.shape[0], self.plan.heads, 1, -1)  # (B, H, 1, S)
        output, weights = self.plain(call, mask if call.mask is None else mask + call.mask, None)
        output = nn.functional.dropout(output, p=self.hidden_dropout, training=self.training)
        return call.residual + output, weights

    def run_whole(self, call):
        output, weights = super().run_whole(call)
        return call.residual + output, weights


class GPTJAttention(ThreadedAttention):
    """GPT-J: rotary embeddings of pairs of neighbours. The stack makes them since 5.24; before, each layer reads them
    from a table by position."""

    own_eager = True

    def run(self, call):
        sines = call.positions
        if sines is None and self.plan.own:
            table = self._get_embed_positions(call.position_ids)  # (B, positions, rotary size)
            places = call.position_ids.unsqueeze(-1).expand(-1, -1, table.shape[-1])
            sines = table.gather(1, places).to(call.states.dtype).chunk(2, dim=-1)
        return self.plain(call, call.mask, sines)

    def turn(self, query, key, positions):
        sin, cos = positions
        width = self.rotary_dim or self.size

        def turn(states):
            turned = self.rotate(states[..., :width].transpose(1, 2), sin, cos).transpose(1, 2)
            return torch.cat([turned, states[..., width:]], dim=-1)

        return turn(query), turn(key)


class EncoderDecoderAttention(ThreadedAttention):
    """Self-attention and cross-attention of BART and its kin."""

    needs, own_eager = ("source",), True

    def run(self, call):
        output, weights = self.across(call, call.mask)
        return self.finish(output, call.states), weights

    def run_whole(self, call):
        held = call.cache if call.source is None else None  # what is read of an encoder has one length, and no count
        held = held.self_attention_cache if isinstance(held, EncoderDecoderCache) else held
        return self.stand_in(call.states, held, *self.extra(call)), None

    def shrink(self, layer, stack):
        """A norm that only queries read is frozen if there are none: its parameters become buffers. So files keep them,
        and no optimizer waits for their gradients."""
        super().shrink(layer, stack)
        norm = layer.get_submodule(stack.query_input) if stack.query_input and not self.plan.own else nn.Module()
        for name, parameter in list(norm.named_parameters(recurse=False)):
            delattr(norm, name)
            norm.register_buffer(name, parameter.detach())

    def held(self, view, number):
        """Key (B, own, S, D), or of no meaning without own keys, and value (B, G, S, D), as an earlier pass left them
        in a cache. Raises ValueError if that was another model's."""
        layer, own = view.layers[number], view.own
        key, value = layer.keys, layer.values
        if not own and not value.numel():
            return key, key
        groups, grows = self.plan.heads // self.plan.group, type(layer).update in GROW
        if value.shape[1] != groups or key.shape[1] < own or (grows and key.shape[1] != own):
            raise view.foreign(number, key.shape[1])
        return key[:, : own or None], value

    def across(self, call, mask):
        """Heads' outputs (B, T, H, D) and probabilities. mask: as in `call`, or what makes it of queries and their
        keys' number."""
        plan, cross, cache, query = self.plan, call.source is not None, call.cache, None
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.cross_attention_cache if cross else cache.self_attention_cache
        filled = getattr(call.cache, "is_updated", {}) if cross else {}
        if cache is not None and filled.get(plan.layer):
            query = self.split(getattr(self, self.names.query)(call.states)) if plan.own else None
            key, value = self.held(self.view(cache, self.exchange_of(call)), plan.layer)
        else:
            query, key, value, _ = self.project(call.states, call.source)
            if cache is not None:
                view = self.view(cache, self.exchange_of(call))
                key, value = view.update(key, value, plan.layer, *(() if cross else self.extra(call)))
                filled[plan.layer] = True
        if callable(mask):
            exchange = self.exchange_of(call)
            parts = None if exchange is None else exchange.notes.get(("cached", plan.place))
            mask = mask(query if query is not None else value, value.shape[-2] if parts is None else parts.columns)
        return self.attend_call(query, key, value, mask, call)


class T5Attention(EncoderDecoderAttention):
    """T5: relative positions as a bias for each head, which the first layer computes for all."""

    needs, kept = ("source", "bias"), ("relative_attention_bias",)

    def run_whole(self, call):
        before, bias = self.tokens_before(call), call.bias
        output, weights = super().run_whole(call)
        if bias is None and call.source is None:
            # A static cache has room for more keys than there are.
            length = call.states.shape[1] + before if call.mask is None else call.mask.shape[-1]
            bias = self.relative(call, length, before)
            bias = _masked(bias, call.mask, length, False) if self.holds_mask else bias
        return (output, bias) if self.holds_mask and not call.output_attentions else (output, bias, weights)

    def run(self, call):
        holds_mask, before, bias = self.holds_mask, self.tokens_before(call), call.bias

        def combined(states, length):
            """Bias and mask together: (1 or B, H, T, S), or None."""
            nonlocal bias
            if call.source is not None:  # a bias of cross-attention is nothing but the mask
                return bias if holds_mask and bias is not None else call.mask
            if bias is None:
                bias = self.relative(call, length, before)
                bias = _masked(bias, call.mask, length, False) if holds_mask else bias
            return bias if holds_mask else _masked(bias, call.mask, length, self.is_causal)

        output, weights = self.across(call, combined)
        output = self.finish(output, call.states)
        return (output, bias) if holds_mask and not call.output_attentions else (output, bias, weights)

    @property
    def holds_mask(self):
        """Until 5.14 the first layer adds the mask to the bias that it hands on. Probabilities come if asked for."""
        return "output_attentions" in self.arguments.roles

    def tokens_before(self, call):
        """How many tokens are cached before this pass, in self-attention."""
        if call.cache is None or call.source is not None:
            return 0
        before = call.cache.get_seq_length(self.plan.layer)
        return before.clone() if isinstance(before, torch.Tensor) else before

    def relative(self, call, length, before):
        """Relative positions of T new tokens to S: (1, H, T, S)."""
        tokens, device = call.states.shape[1], call.states.device
        if "cache_position" in signature(self.compute_bias).parameters:  # until 5.3
            return self.compute_bias(length, length, device, call.cache_position)[:, :, -tokens:]
        return self.compute_bias(tokens, length, device, before)

    def scale(self):
        return 1.0


def _masked(bias, mask, length, causal):
    """The bias, and the least number wherever a token does not see: not their sum, which half precision lacks."""
    tokens = bias.shape[-2]
    if mask is None and not (causal and tokens > 1):
        return bias
    if mask is None:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=bias.device).tril()
    mask = mask[..., :length]
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask
