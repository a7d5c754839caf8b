"""The attention function of layers that share: what they compute themselves, lend and borrow.

Sharing weights equals attention over the source's query and key, so there are two forms:

- *Weights*: the source's probabilities are multiplied with the values; no Q.K and no softmax. They take memory for
  every pair of tokens, so this is for decoding, and for prompts whose probabilities fit (`shared_attention_weights`).
- *Queries*: the source's query and key go through the attention kernel once more, without the quadratic memory.

Which one runs is decided by the layer that lends, call by call (`Attending._lends_weights`).

Letters in shape comments as in `shared_attention`.
"""

from functools import partial

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .shared_attention_arguments import take_paged
from .shared_attention_exchange import EXCHANGE, Loan, current_exchange
from .shared_attention_paged import update_paged
from .shared_attention_plan import LayerPlan
from .shared_attention_weights import additive, blocks_of, causal_mask, is_exporting, pairs_of, probabilities, weigh

WEIGHTS_MEMORY = 128 * 1024 * 1024
"""Bytes that lent probabilities may take at any one time by default (`weights_memory` in the config)."""

FORMS = ("auto", "weights", "queries")
"""Values of `form` in the config."""

GAIN = 1.0
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

    def grouped(self, group):
        """The same with another grouping."""
        return _KernelModule(self._module, group)


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


def _gather(runs, own, borrowed):
    """Concatenate runs along the head axis: own is this layer's tensor or None, borrowed(layer) that of a loan.

    Raises RuntimeError if heads are missing, as in a process that tensor parallelism gave a share of them.
    """
    pieces = []
    for run in runs:
        heads = own if run.layer is None else borrowed(run.layer)
        whole = run.start == 0 and run.stop == heads.shape[1]
        if run.stop > heads.shape[1] > 1 and (len(runs) > 1 or run.start):
            raise RuntimeError(
                "shared_attention: a head reuses one that is not in this process. Heads that reuse others than their "
                "own number cannot be divided: leave attention out of the tp_plan."
            )
        pieces.append(heads if whole else heads[:, run.start : run.stop])
    device = pieces[-1].device if own is None else own.device
    if len(pieces) == 1:
        return pieces[0]
    if any(piece.device != device for piece in pieces):
        pieces = [piece.to(device) for piece in pieces]
    if any(piece.shape[0] != pieces[0].shape[0] for piece in pieces):  # a mask may be one for all sequences
        batch = max(piece.shape[0] for piece in pieces)
        pieces = [piece.expand(batch, *piece.shape[1:]) for piece in pieces]
    return torch.cat(pieces, dim=1)


def as_laid_out_by_families(query, key, value):
    """The same, in the order in memory that they have in layers without sharing: flex attention compiles a kernel for
    every order, up to a limit."""
    return query.transpose(1, 2).contiguous().transpose(1, 2), key.contiguous(), value.contiguous()


def _rescaled(loan, arguments):
    """The loan's query for a kernel that scales scores as `arguments` say: layers may differ in that."""
    wanted, scaling = arguments.get("scaling"), loan.arguments.get("scaling")
    return loan.query if wanted == scaling else loan.query * (scaling / wanted)


class Attending(nn.Module):
    """The attention function of a layer that shares, as a method of its attention module."""

    plan: LayerPlan | None
    names: object  # the Family entry
    stack: str  # of the layer, in models that have several kinds of attention
    group: int  # query heads per key/value group
    sharing: dict  # config.shared_attention

    def _lends_weights(self, implementation, query, length, mask):
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
        batch, _, tokens, _ = query.shape
        # Compiled, a prompt's blocks would make a graph for every length.
        if tokens > 1 and (torch.is_grad_enabled() or self.plan.gain < GAIN or torch.compiler.is_compiling()):
            return False
        if is_exporting():  # one token's fit, and an exported graph must not depend on how many are cached
            return True
        pairs = pairs_of(tokens, length, self._triangular(implementation, mask, tokens))
        needed = batch * len(self.plan.heads) * pairs * query.element_size() * self.plan.lenders_at_once
        return needed <= self.sharing.get("weights_memory", WEIGHTS_MEMORY)

    def _triangular(self, implementation, mask, tokens):
        """Whether no mask means that each token sees those before it, as kernels have it."""
        return mask is None and tokens > 1 and self.is_causal and implementation != "eager"

    def attend(self, exchange, implementation, query, key, value, mask, arguments):
        """The attention function: own heads from query and key, the others from the exchange.

        query: (B, O, T, D); key: (B, own groups, S, D), both None where nothing is own; value: (B, G, S, D). mask: for
        all heads alike, or (., H, T, S) of this layer. Returns the output (B, T, H, D), and the weights (B, H, T, S)
        where they were computed, else None.
        """
        plan = self.plan
        if plan is None:
            kernel = self.family_eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
            return kernel(_KernelModule(self, self.group), query, key, value, mask, **arguments)
        implementation = "eager" if implementation == "paged|eager" else implementation
        kernel = self.family_eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        paged = take_paged(arguments)
        if paged is not None:
            key, value = update_paged(paged, key, value, plan.layer, arguments)
        exchange = exchange or current_exchange()
        if exchange is None:
            raise RuntimeError(
                f"shared_attention: layer {plan.layer} lends to other layers, or borrows from them, so it runs only "
                "within its model's forward: run the whole model (checkpointing needs use_reentrant=False)."
            )
        if plan.reuses:
            loans = [exchange.borrow(self.stack, layer) for layer in plan.lenders]
            weights_form = all(loan.weights is not None for loan in loans)
            arguments = arguments if query is not None else loans[0].arguments
        else:
            weights_form = self._lends_weights(implementation, query, key.shape[-2], mask)
        own_mask = None
        if query is not None and mask is not None and mask.shape[1] > 1:
            own_mask = mask = mask if len(plan.own) == mask.shape[1] else mask[:, list(plan.own)]
        if weights_form:
            whole = implementation == "eager" or torch.compiler.is_compiling()
            triangular = query is not None and self._triangular(implementation, mask, query.shape[-2])
            own = (
                None
                if query is None
                else self._own_blocks(implementation, query, key, mask, arguments, triangular, whole)
            )
            if own and plan.lends:
                exchange.lend(self.stack, plan.layer, Loan(query, key, own, arguments, own_mask))
            output, weights = self._attend_weights(exchange, own, value, whole)
        elif plan.reuses:
            output, weights = self._attend_queries(exchange, kernel, query, key, value, mask, own_mask, arguments)
        else:
            output, weights = kernel(_KernelModule(self, plan.group), query, key, value, mask, **arguments)
            exchange.lend(self.stack, plan.layer, Loan(query, key, None, arguments, own_mask))
        exchange.settle(self.stack, plan.settled)
        return output, weights

    def _own_blocks(self, implementation, query, key, mask, arguments, triangular, whole):
        """Probabilities of own heads: blocks (B, O, R, E)."""
        plan, tokens, length, dtype = self.plan, query.shape[-2], key.shape[-2], query.dtype
        if implementation != "eager" and dtype.itemsize < 4:
            # Fused kernels keep scores in float32, so who chose one must not get less: below it, scores of heads with
            # large biases overflow (float16) or lose what tells tokens apart (bfloat16).
            query, key = query.float(), key.float()
        group = plan.own_group
        if group is None:
            key, group = key[:, plan.own_key_of_head], 1
        mask = additive(mask, query, length)
        module, found = _KernelModule(self, group), []
        for start, stop, seen in blocks_of(tokens, length, triangular, whole):
            rows = query if stop - start == tokens else query[:, :, start:stop]
            if triangular:
                mask = causal_mask(query, start, stop)
            every = mask is None or mask.shape[-2] in (1, stop - start)
            rows_mask = mask if every else mask[:, :, start:stop]
            keys = key if seen == length else key[:, :, :seen]
            lent = probabilities(self.family_eager, module, rows, keys, rows_mask, group, arguments)
            found.append(lent if lent.dtype == dtype else lent.to(dtype))
        return found

    def _attend_weights(self, exchange, own, value, whole):
        """Weights form, of own heads' probabilities and borrowed ones. Those of a whole prompt are returned beside the
        output, as eager attention does."""
        plan, blocks = self.plan, own
        if plan.reuses:
            lent = {layer: exchange.borrow(self.stack, layer).weights for layer in plan.lenders}
            blocks = [
                _gather(plan.query_runs, own and own[index], {layer: lent[layer][index] for layer in lent}.__getitem__)
                for index in range(len(lent[plan.lenders[0]]))
            ]
        outputs = [weigh(block, value) for block in blocks]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), (blocks[0] if whole else None)

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
        query, key = query.to(value.device), key.to(value.device)
        if "flex" in (self.model_config._attn_implementation or ""):
            query, key, value = as_laid_out_by_families(query, key, value)
        return kernel(module, query, key, value, mask, **arguments)
