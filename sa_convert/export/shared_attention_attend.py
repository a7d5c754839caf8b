"""The attention function of layers that share: what they compute themselves, lend and borrow.

Sharing weights equals attention over the source's query and key, so there are two forms:

- *Weights*: the source's probabilities are multiplied with the values; no Q.K and no softmax. They take memory for
  every pair of tokens, so this is for decoding, and for prompts whose probabilities fit.
- *Queries*: the source's query and key go through the attention kernel once more, without the quadratic memory.

Which one runs is decided by the layer that lends, call by call (`Attending._lends_weights`).

Letters in shape comments as in `shared_attention`.
"""

from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .shared_attention_exchange import EXCHANGE, Loan, current_exchange
from .shared_attention_plan import LayerPlan

WEIGHTS_MEMORY = 128 * 1024 * 1024
"""Bytes that the probabilities of one lending layer may take by default (`weights_memory` in the config)."""

FORMS = ("auto", "weights", "queries")
"""Values of `form` in the config."""

GAIN = 2.0
"""Heads that reuse, for each head that computes probabilities, from which the weights form pays for a whole prompt."""


class _KernelModule:
    """The attention module as an attention function should see it: the real config, this grouping of heads, and where
    they are borrowed, the sinks of all heads."""

    def __init__(self, module, group, sinks=None):
        self._module = module
        self.num_key_value_groups = group
        self.config = module.model_config
        if sinks is not None:
            setattr(self, module.names.sinks, sinks)

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


class Attending(nn.Module):
    """The attention function of a layer that shares, as a method of its attention module."""

    plan: LayerPlan | None
    names: object  # the Family entry
    stack: str  # of the layer, in models that have several kinds of attention
    group: int  # query heads per key/value group
    sharing: dict  # config.shared_attention

    def _lends_weights(self, implementation, query, length):
        """Whether this call lends probabilities (B, O, T, S) rather than queries and keys."""
        form = self.sharing.get("form", "auto")
        if implementation == "eager" or form == "queries":
            return form != "queries"
        if implementation != "sdpa":
            if form == "weights":
                raise ValueError(f"shared_attention: the weights form needs eager or sdpa, not {implementation}.")
            return False
        if form == "weights":
            return True
        batch, heads, tokens, _ = query.shape
        if tokens > 1 and (torch.is_grad_enabled() or self.plan.gain < GAIN):
            return False
        budget = self.sharing.get("weights_memory", WEIGHTS_MEMORY)
        return batch * heads * tokens * length * query.element_size() <= budget

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
        if plan.reuses:
            loans = [exchange.borrow(self.stack, layer) for layer in plan.lenders]
            weights_form = all(loan.weights is not None for loan in loans)
            arguments = arguments if query is not None else loans[0].arguments
        else:
            weights_form = self._lends_weights(implementation, query, key.shape[-2])
        own_mask = None
        if query is not None:
            if weights_form and implementation != "eager":
                mask = self._added(mask, query, key.shape[-2])
            if mask is not None and mask.shape[1] > 1:
                own_mask = mask = mask if len(plan.own) == mask.shape[1] else mask[:, list(plan.own)]
        if weights_form:
            output, weights = self._attend_weights(exchange, query, key, value, mask, own_mask, arguments)
        elif plan.reuses:
            output, weights = self._attend_queries(exchange, kernel, query, key, value, mask, own_mask, arguments)
        else:
            output, weights = kernel(_KernelModule(self, plan.group), query, key, value, mask, **arguments)
            exchange.lend(self.stack, plan.layer, Loan(query, key, None, arguments, own_mask))
        exchange.settle(self.stack, plan.settled)
        return output, weights

    def _added(self, mask, query, length):
        """A mask to be added to scores, from one for SDPA, which may be boolean, or missing where all is causal."""
        tokens = query.shape[-2]
        if mask is None and tokens > 1 and self.is_causal:
            # As kernels mean it: the first token sees the first key, whatever else a static cache has room for.
            mask = torch.ones(1, 1, tokens, length, dtype=torch.bool, device=query.device).tril()
        return additive(mask, query, length)

    def _attend_weights(self, exchange, query, key, value, mask, own_mask, arguments):
        """Weights form: own heads' probabilities from the family's eager function, the others' from their source."""
        plan, own = self.plan, None
        if query is not None:
            own_key, group = key, plan.own_group
            if group is None:
                own_key, group = key[:, plan.own_key_of_head], 1
            own = self._probabilities(query, own_key, mask, group, arguments)
            if plan.lends:
                exchange.lend(self.stack, plan.layer, Loan(query, key, own, arguments, own_mask))
        weights = own
        if plan.reuses:
            weights = _gather(plan.query_runs, own, lambda layer: exchange.borrow(self.stack, layer).weights)
        return _weigh(weights, value), weights

    def _probabilities(self, query, key, mask, group, arguments):
        """(B, O, T, S) of query (B, O, T, D) and key (B, O / group, S, D), by the family's eager function."""
        batch, heads, tokens, size = query.shape
        if group > 1 and not self.names.sinks:
            # Queries that read one key stand in as so many tokens of one head, so that no key is repeated.
            if mask is not None and mask.shape[1] > 1:
                mask = mask.reshape(mask.shape[0], -1, group * tokens, mask.shape[-1])
            elif mask is not None and tokens > 1:
                mask = mask.repeat(1, 1, group, 1)
            query, group = query.reshape(batch, -1, group * tokens, size), 1
        # Zero-width values: only the weights are wanted here.
        weights = self.family_eager(_KernelModule(self, group), query, key, key[..., :0], mask, **arguments)[1]
        return weights.view(batch, heads, tokens, -1)

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
        if own_mask is not None or borrow(plan.lenders[0]).mask is not None:
            mask = _gather(plan.query_runs, own_mask, lambda layer: borrow(layer).mask)
        query = _gather(plan.query_runs, query, lambda layer: _rescaled(borrow(layer), arguments))
        key = _gather(plan.key_runs, key, lambda layer: borrow(layer).key)
        if plan.key_group != plan.group:
            value = value.repeat_interleave(plan.group, dim=1)
        module = _KernelModule(self, plan.key_group, arguments.get("s_aux"))
        return kernel(module, query.to(value.device), key.to(value.device), value, mask, **arguments)
