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

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .shared_attention_cache import PackedCache, store
from .shared_attention_plan import LayerPlan

# The keyword under which the exchange travels through the model's forward.
EXCHANGE = "shared_attention"


@dataclass(frozen=True)
class Loan:
    """What a source layer lends: the attention of its own heads, in their order.

    query: (B, O, T, D); key: (B, own groups, S, D), cache included; weights: (B, O, T, S), or None in the queries form;
    arguments: what the family passed to the attention function besides (scaling, window, softcap, sinks, dropout).
    """

    query: torch.Tensor
    key: torch.Tensor
    weights: torch.Tensor | None
    arguments: dict


class Exchange:
    """The loans of one forward pass."""

    def __init__(self):
        self._loans = {}

    def lend(self, layer: int, loan: Loan) -> None:
        # A checkpointed layer lends again when it is computed again; the first loan is the one in the graph.
        self._loans.setdefault(layer, loan)

    def borrow(self, layer: int) -> Loan:
        return self._loans[layer]

    def settle(self, layers: tuple[int, ...]) -> None:
        """Forget loans that no later layer needs. With gradients, a layer that is computed again still needs them."""
        if not torch.is_grad_enabled():
            for layer in layers:
                self._loans.pop(layer, None)


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
    """Plain attention, for families whose modeling file (in transformers 4) does not offer its own.

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


def _additive(mask, query, length):
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
    return pieces[0] if len(pieces) == 1 else torch.cat([piece.to(device) for piece in pieces], dim=1)


def _weigh(weights, value):
    """Weights (B, H, T, S) times values (B, G, S, D) -> (B, T, H, D), without repeating the values."""
    batch, heads, tokens, length = weights.shape
    weights = weights.to(value.device).reshape(batch, value.shape[1], -1, length)
    return torch.matmul(weights, value).view(batch, heads, tokens, -1).transpose(1, 2)


class SharedAttention(nn.Module):
    """Mixed into the attention class of a family by `shared_attention_apply`: lends own heads, borrows the others'."""

    plan: LayerPlan | None
    names: object  # the Family entry: module names and how the exchange travels

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, **kwargs):
        if self.names.exchange == "positions":
            *position_embeddings, kwargs[EXCHANGE] = position_embeddings
        if self.plan is not None and not self.plan.own:
            return self._reuse(hidden_states, attention_mask, past_key_values, **kwargs)
        if past_key_values is not None and self.plan is not None and self.plan.packs_cache:
            past_key_values = PackedCache(past_key_values)
        if self.names.plain_forward:
            return self._plain(hidden_states, attention_mask, position_embeddings, past_key_values, **kwargs)
        if position_embeddings is not None:
            kwargs["position_embeddings"] = position_embeddings
        return super().forward(
            hidden_states=hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )

    def _project(self, name, hidden_states):
        """(B, T, hidden) -> (B, heads, T, D)"""
        states = getattr(self, name)(hidden_states)
        return states.view(*hidden_states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _output(self, attention, hidden_states):
        """(B, T, H, D) -> (B, T, hidden)"""
        output = attention.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if self.names.output_norm:
            output = getattr(self, self.names.output_norm)(output)
        output = getattr(self, self.names.output)(output)
        return nn.functional.dropout(output, p=getattr(self, "residual_dropout", 0.0), training=self.training)

    def _reuse(self, hidden_states, attention_mask, past_key_values, **kwargs):
        """A layer all of whose heads reuse: values and output projection only."""
        value = self._project(self.names.value, hidden_states)
        limit = getattr(self.model_config, self.names.value_limit or "", None)
        if limit is not None:
            value = value.clamp(min=-limit, max=limit)
        if past_key_values is not None:
            # transformers 4 hands the positions to a static cache; 5 counts them itself.
            extra = ({"cache_position": kwargs["cache_position"]},) if "cache_position" in kwargs else ()
            value = store(past_key_values, value, self.layer_idx, *extra)
        implementation = self.model_config._attn_implementation or "eager"
        output, weights = self.attend(kwargs.get(EXCHANGE), implementation, None, None, value, attention_mask, None)
        return self._output(output, hidden_states), weights

    def _plain(self, hidden_states, attention_mask, position_embeddings, past_key_values, **kwargs):
        """Rotary (or learned-position) attention as families without special steps do it, for any number of heads."""
        query = self._project(self.names.query, hidden_states)
        key = self._project(self.names.key, hidden_states)
        value = self._project(self.names.value, hidden_states)
        if self.names.query_norm and hasattr(self, self.names.query_norm):
            query = getattr(self, self.names.query_norm)(query)
            key = getattr(self, self.names.key_norm)(key)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            width = cos.shape[-1]  # partial rotary: the first `width` of D turn
            query_turned, key_turned = self.rotate(query[..., :width], key[..., :width], cos, sin)
            query = torch.cat([query_turned, query[..., width:]], dim=-1)
            key = torch.cat([key_turned, key[..., width:]], dim=-1)
        if past_key_values is not None:
            extra = ({"cache_position": kwargs["cache_position"]},) if "cache_position" in kwargs else ()
            key, value = past_key_values.update(key, value, self.layer_idx, *extra)
        arguments = {
            "scaling": self.head_dim**-0.5,
            "dropout": getattr(self, self.names.dropout) if self.training else 0.0,
        }
        implementation = self.model_config._attn_implementation or "eager"
        output, weights = self.attend(
            kwargs.get(EXCHANGE), implementation, query, key, value, attention_mask, arguments
        )
        return self._output(output, hidden_states), weights

    def attend(self, exchange, implementation, query, key, value, mask, arguments):
        """The attention function: own heads from query and key, the others from the exchange.

        query: (B, O, T, D); key: (B, own groups, S, D), both None where nothing is own; value: (B, G, S, D).
        Returns the output (B, T, H, D), and the weights (B, H, T, S) where they were computed, else None.
        """
        plan = self.plan
        kernel = self.family_eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        if plan is None:
            return kernel(_KernelModule(self, self.groups), query, key, value, mask, **arguments)
        if exchange is None:
            raise RuntimeError(
                f"Layer {plan.layer} shares attention with other layers, so it runs only within its model's forward."
            )
        weights_form = implementation == "eager"
        if query is None:
            lender = exchange.borrow(plan.query_runs[0].layer)
            weights_form, arguments = lender.weights is not None, lender.arguments
        elif implementation == "sdpa" and query.shape[-2] == 1:
            weights_form, kernel, mask = True, self.family_eager, _additive(mask, query, key.shape[-2])
        if not plan.reuses:
            output, weights = kernel(_KernelModule(self, plan.group), query, key, value, mask, **arguments)
            exchange.lend(plan.layer, Loan(query, key, weights if weights_form else None, arguments))
            return output, weights
        if weights_form:
            output, weights = self._attend_weights(exchange, kernel, query, key, value, mask, arguments)
        else:
            output, weights = self._attend_queries(exchange, kernel, query, key, value, mask, arguments)
        exchange.settle(plan.settled)
        return output, weights

    def _attend_weights(self, exchange, eager, query, key, value, mask, arguments):
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
                exchange.lend(plan.layer, Loan(query, key, own, arguments))
        weights = _gather(plan.query_runs, own, lambda layer: exchange.borrow(layer).weights)
        return _weigh(weights, value), weights

    def _attend_queries(self, exchange, kernel, query, key, value, mask, arguments):
        """Queries form: borrowed queries and keys take the place of the missing ones, and the kernel does the rest."""
        plan = self.plan
        if query is not None and plan.lends:
            exchange.lend(plan.layer, Loan(query, key, None, arguments))
        sinks = arguments.get("s_aux")
        if sinks is not None:
            own = sinks[None] if query is not None else None
            every = _gather(plan.query_runs, own, lambda layer: exchange.borrow(layer).arguments["s_aux"][None])
            arguments = {**arguments, "s_aux": every[0]}
        query = _gather(plan.query_runs, query, lambda layer: exchange.borrow(layer).query)
        key = _gather(plan.key_runs, key, lambda layer: exchange.borrow(layer).key)
        if plan.key_group != plan.group:
            value = value.repeat_interleave(plan.group, dim=1)
        module = _KernelModule(self, plan.key_group)
        return kernel(module, query.to(value.device), key.to(value.device), value, mask, **arguments)
