"""Attention shared across layers, for models of Hugging Face transformers.

*Shared Attention* (Liao & Vargas, arXiv 2407.12866) lets a layer use the attention weights that an earlier layer
computed. Here the choice is made per query head: a head either owns its attention, or reuses that of one source head.
A key/value group none of whose heads own their attention has no query and no key projection and caches no keys.

How it works in any model that dispatches through the attention interface of transformers:

- The layers of one forward pass share an `Exchange`, which travels with the call (never on a module), so that threads
  do not meet, nothing outlives the pass, and a checkpointed layer that is computed again finds the same tensors.
- The attention module keeps its family's own `forward`; it sees a config that names our attention function, which
  receives query and key as the family prepared them (normalised, rotated, cached), lends them, and fills in borrowed
  heads. A layer without any own head needs only its values, and runs `SharedAttention._reuse`.
- Sharing weights equals attention over the source's query and key, so there are two forms. *Weights*: the source's
  probabilities are multiplied with the values; no Q.K and no softmax. *Queries*: the source's query and key go through
  the attention kernel once more, without the quadratic memory. Eager attention and single-token decoding use the first.
- A reusing head caches no keys. Values (and the keys that a layer still owns) lie in the cache's key slot, beside a
  zero-width value slot, so that every public cache operation keeps working on them.

Letters in shape comments: B batch, H query heads, O own query heads, G key/value groups, T query tokens, S cached
tokens, D head size.
"""

from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .shared_attention_cache import AttentionCache, PackedCache
from .shared_attention_exchange import EXCHANGE, Loan, current_exchange
from .shared_attention_plan import LayerPlan


class _KernelModule:
    """The attention module as an attention function should see it: the real config, and this grouping of heads."""

    def __init__(self, module, group):
        self._module = module
        self.num_key_value_groups = group
        self.config = module.model_config

    def __getattr__(self, name):
        return getattr(self.__dict__["_module"], name)


class ConfigView:
    """The model's config, except that it names our attention function around the chosen one."""

    def __init__(self, config):
        self._config = config

    def __getattr__(self, name):
        if name.startswith("__") or "_config" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._config, name)

    @property
    def _attn_implementation(self):
        implementation = self._config._attn_implementation or "eager"
        name = f"shared_attention/{implementation}"
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, partial(_dispatch, implementation))
        return name


def _dispatch(implementation, module, query, key, value, attention_mask, **arguments):
    exchange = arguments.pop(EXCHANGE, None)
    return module.attend(exchange, implementation, query, key, value, attention_mask, arguments)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, for families whose modeling file does not offer its own for any number of heads.

    query: (B, H, T, D); key, value: (B, G, S, D). Returns the output (B, T, H, D) and the weights (B, H, T, S).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def additive(mask, query, length):
    """A mask as eager attention adds it: SDPA's may be boolean or longer than the keys."""
    if mask is None:
        return None
    mask = mask[..., :length]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def _gather(runs, own, borrowed):
    """Concatenate runs along the head axis: own is this layer's tensor or None, borrowed(layer) that of a loan."""
    pieces = []
    for run in runs:
        heads = own if run.layer is None else borrowed(run.layer)
        whole = run.start == 0 and run.stop == heads.shape[1]
        pieces.append(heads if whole else heads[:, run.start : run.stop])
    device = pieces[-1].device if own is None else own.device
    if len(pieces) == 1:
        return pieces[0]
    batch = max(piece.shape[0] for piece in pieces)  # a mask may be one for all sequences
    return torch.cat([piece.to(device).expand(batch, *piece.shape[1:]) for piece in pieces], dim=1)


def _rescaled(loan, arguments):
    """The loan's query for a kernel that scales scores as `arguments` say: layers may differ in that."""
    wanted, scaling = arguments.get("scaling"), loan.arguments.get("scaling")
    return loan.query if wanted == scaling else loan.query * (scaling / wanted)


def _weigh(weights, value):
    """Weights (B, H, T, S) times values (B, G, S, D) -> (B, T, H, D), without repeating the values."""
    batch, heads, tokens, length = weights.shape
    weights = weights.to(value.device).reshape(batch, value.shape[1], -1, length)
    return torch.matmul(weights, value).view(batch, heads, tokens, -1).transpose(1, 2)


def _probability(dropout):
    return dropout.p if isinstance(dropout, nn.Dropout) else dropout


class SharedAttention(nn.Module):
    """Mixed into the attention class of a family by `shared_attention_apply`: lends own heads, borrows the others'."""

    plan: LayerPlan | None
    names: object  # the Family entry: module names and how the exchange travels
    stack: str  # of the layer, in models that have several kinds of attention
    group: int  # query heads per key/value group
    size: int  # D

    def forward(self, hidden_states, *args, **kwargs):
        if self.names.exchange == "positions":
            *kwargs["position_embeddings"], kwargs[EXCHANGE] = kwargs["position_embeddings"]
        plan = self.plan
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if plan is not None and (not plan.own or self.names.plain_forward):
            positions = kwargs.pop("position_embeddings", None)
            mask = kwargs.pop("attention_mask", args[0] if args else None)
            return self._plain(hidden_states, mask, positions, cache, **kwargs)
        if plan is None:
            kwargs.pop(EXCHANGE, None)
        elif cache is not None and plan.packs_cache:
            kwargs["past_key_values"] = PackedCache(cache)
        return super().forward(hidden_states, *args, **kwargs)

    def _plain(self, hidden_states, mask, positions, cache, **kwargs):
        """Attention as families without special steps do it, for any number of own heads; of a layer that reuses
        wholly, values and output projection only."""
        query, key, value, gate = self._project(hidden_states)
        if query is not None:
            query, key = self._normalise(query, key)
            query, key = self._turn(query, key, positions, kwargs)
        if cache is not None:
            # transformers 4 hands the positions to a static cache; 5 counts them itself.
            extra = ({"cache_position": kwargs["cache_position"]},) if "cache_position" in kwargs else ()
            key, value = AttentionCache(cache, self.layer_idx).update(key, value, *extra)
        output, weights = self._attend(query, key, value, mask, kwargs)
        return self._output(output, hidden_states, gate), weights

    def _attend(self, query, key, value, mask, kwargs):
        """As `attend`, with what a family's forward would have handed to the attention function."""
        arguments = None
        if query is not None:
            arguments = {
                "scaling": self._scaling(),
                "dropout": _probability(getattr(self, self.names.dropout, 0.0)) if self.training else 0.0,
            }
        implementation = self.model_config._attn_implementation or "eager"
        return self.attend(kwargs.get(EXCHANGE), implementation, query, key, value, mask, arguments)

    def _scaling(self):
        return getattr(self, "scaling", self.size**-0.5)

    def _split(self, states):
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return states.view(*states.shape[:-1], -1, self.size).transpose(1, 2)

    def _project(self, hidden_states, source_states=None):
        """Query (B, O, T, D), key (B, own groups, S, D), both None where nothing is own, value (B, G, S, D), and the
        gate (B, T, H * D) or None. source_states: what keys and values are made of, if it is not the same."""
        names, own = self.names, self.plan.own
        if names.fused:
            return (*self._unfuse(getattr(self, names.fused)(hidden_states)), None)
        source_states = hidden_states if source_states is None else source_states
        value = self._split(getattr(self, names.value)(source_states))
        limit = getattr(self.model_config, names.value_limit or "", None)
        if limit is not None:
            value = value.clamp(min=-limit, max=limit)
        query = getattr(self, names.query)(hidden_states) if own or names.gate == "query" else None
        gate = None
        if names.gate == "query":
            query, gate = self._ungate(query)
        if not own:
            return None, None, value, gate
        return self._split(query), self._split(getattr(self, names.key)(source_states)), value, gate

    def _unfuse(self, states):
        """The fused projection's output (B, T, ...), apart. A layer that reuses holds own queries, own keys and all
        values, in this order; one that only lends has the order of its family."""
        plan, names = self.plan, self.names
        groups = len(plan.heads) // plan.group
        if names.fused_order == "groups" and not plan.reuses:
            states = states.view(*states.shape[:-1], groups, plan.group + 2, self.size)  # (B, T, G, ., D)
            query = states[..., :-2, :].flatten(2, 3)
            return tuple(part.transpose(1, 2) for part in (query, states[..., -2, :], states[..., -1, :]))
        sizes = [len(plan.own) * self.size, len(plan.own_groups) * self.size, groups * self.size]
        query, key, value = states.split(sizes, dim=-1)
        if not plan.own:
            return None, None, self._split(value)
        return self._split(query), self._split(key), self._split(value)

    def _ungate(self, states):
        """Queries and gates of one projection: a layer that reuses holds own queries, then all gates; one that only
        lends has each head's gate beside its query."""
        plan = self.plan
        if plan.reuses:
            return states.split([len(plan.own) * self.size, len(plan.heads) * self.size], dim=-1)
        pairs = states.view(*states.shape[:-1], len(plan.heads), 2, self.size)  # (B, T, H, 2, D)
        return pairs[..., 0, :].flatten(-2), pairs[..., 1, :].flatten(-2)

    def _normalise(self, query, key):
        names = self.names
        if names.query_norm and hasattr(self, names.query_norm):
            query, key = getattr(self, names.query_norm)(query), getattr(self, names.key_norm)(key)
        return query, key

    def _turn(self, query, key, positions, kwargs):
        """Rotate queries and keys by their positions, in families that do."""
        if positions is None:
            return query, key
        cos, sin = positions
        width = cos.shape[-1]  # partial rotary: the first `width` of D turn
        query_turned, key_turned = self.rotate(query[..., :width], key[..., :width], cos, sin)
        if width == self.size:
            return query_turned, key_turned
        query = torch.cat([query_turned, query[..., width:]], dim=-1)
        return query, torch.cat([key_turned, key[..., width:]], dim=-1)

    def _output(self, attention, hidden_states, gate=None):
        """(B, T, H, D) -> (B, T, hidden)"""
        names = self.names
        output = attention.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if gate is not None:
            output = output * torch.sigmoid(gate)
        if names.output_norm:
            output = getattr(self, names.output_norm)(output)
        if not names.output_outside:
            output = getattr(self, names.output)(output)
        if names.output_dropout:
            output = getattr(self, names.output_dropout)(output)
        return nn.functional.dropout(output, p=getattr(self, "residual_dropout", 0.0), training=self.training)

    def attend(self, exchange, implementation, query, key, value, mask, arguments):
        """The attention function: own heads from query and key, the others from the exchange.

        query: (B, O, T, D); key: (B, own groups, S, D), both None where nothing is own; value: (B, G, S, D). mask: for
        all heads alike, or (., H, T, S) of this layer. Returns the output (B, T, H, D), and the weights (B, H, T, S)
        where they were computed, else None.
        """
        plan = self.plan
        kernel = self.family_eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        if plan is None:
            return kernel(_KernelModule(self, self.group), query, key, value, mask, **arguments)
        exchange = exchange or current_exchange()
        if exchange is None:
            raise RuntimeError(
                f"Layer {plan.layer} shares attention with other layers, so it runs only within its model's forward."
            )
        weights_form = implementation == "eager"
        if query is None:
            lender = exchange.borrow(self.stack, plan.query_runs[0].layer)
            weights_form, arguments = lender.weights is not None, lender.arguments
        elif implementation == "sdpa" and query.shape[-2] == 1:
            weights_form, kernel, mask = True, self.family_eager, additive(mask, query, key.shape[-2])
        own_mask = None
        if query is not None and mask is not None and mask.shape[1] > 1:
            own_mask = mask = mask if len(plan.own) == mask.shape[1] else mask[:, list(plan.own)]
        if not plan.reuses:
            output, weights = kernel(_KernelModule(self, plan.group), query, key, value, mask, **arguments)
            loan = Loan(query, key, weights if weights_form else None, arguments, own_mask)
            exchange.lend(self.stack, plan.layer, loan)
            return output, weights
        form = self._attend_weights if weights_form else self._attend_queries
        output, weights = form(exchange, kernel, query, key, value, mask, own_mask, arguments)
        exchange.settle(self.stack, plan.settled)
        return output, weights

    def _attend_weights(self, exchange, eager, query, key, value, mask, own_mask, arguments):
        """Weights form: own heads' probabilities from the family's eager function, the others' from their source."""
        plan, own = self.plan, None
        if query is not None:
            own_key, group = key, plan.own_group
            if group is None:
                own_key, group = key[:, plan.own_key_of_head], 1
            # Zero-width values: only the weights are wanted here.
            nothing = own_key[..., :0]
            own = eager(_KernelModule(self, group), query, own_key, nothing, mask, **arguments)[1]
            if plan.lends:
                exchange.lend(self.stack, plan.layer, Loan(query, key, own, arguments, own_mask))
        weights = _gather(plan.query_runs, own, lambda layer: exchange.borrow(self.stack, layer).weights)
        return _weigh(weights, value), weights

    def _attend_queries(self, exchange, kernel, query, key, value, mask, own_mask, arguments):
        """Queries form: borrowed queries and keys take the place of the missing ones, and the kernel does the rest."""
        plan = self.plan

        def borrow(layer):
            return exchange.borrow(self.stack, layer)

        if query is not None and plan.lends:
            exchange.lend(self.stack, plan.layer, Loan(query, key, None, arguments, own_mask))
        sinks = arguments.get("s_aux")
        if sinks is not None:
            own = sinks[None] if query is not None else None
            every = _gather(plan.query_runs, own, lambda layer: borrow(layer).arguments["s_aux"][None])
            arguments = {**arguments, "s_aux": every[0]}
        lenders = [run.layer for run in plan.query_runs if run.layer is not None]
        if own_mask is not None or borrow(lenders[0]).mask is not None:
            mask = _gather(plan.query_runs, own_mask, lambda layer: borrow(layer).mask)
        query = _gather(plan.query_runs, query, lambda layer: _rescaled(borrow(layer), arguments))
        key = _gather(plan.key_runs, key, lambda layer: borrow(layer).key)
        if plan.key_group != plan.group:
            value = value.repeat_interleave(plan.group, dim=1)
        module = _KernelModule(self, plan.key_group)
        return kernel(module, query.to(value.device), key.to(value.device), value, mask, **arguments)
