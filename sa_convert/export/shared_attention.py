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

import sys
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from itertools import groupby

import torch
from torch import nn
from transformers.cache_utils import StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# The keyword under which the exchange travels through the model's forward.
EXCHANGE = "shared_attention"

# transformers 4 sizes both slots of a static cache by the keys, so there a zero-width value slot is not possible.
_STATIC_CACHE_SIZES_SLOTS_ALONE = "value_states" in signature(StaticLayer.lazy_initialization).parameters


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


@dataclass(frozen=True)
class Run:
    """Consecutive heads `start:stop` along the head axis of a loan of `layer`, or of the layer's own (None)."""

    layer: int | None
    start: int
    stop: int


def _runs(places: list[tuple[int | None, int]]) -> tuple[Run, ...]:
    """Join consecutive places (layer, index) of one layer."""
    keyed = groupby(enumerate(places), key=lambda item: (item[1][0], item[1][1] - item[0]))
    runs = ([place for _, place in items] for _, items in keyed)
    return tuple(Run(run[0][0], run[0][1], run[-1][1] + 1) for run in runs)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer owns, lends and borrows; made once from the map.

    heads: per query head, None (own) or (source layer, source head). group: query heads per key/value group.
    own: own query heads. own_groups: groups with an own head. own_group: own heads per own group where that is the same
    for all, else None. query_runs: for every head, where its query (or weights) lies. key_runs and key_group: where the
    keys lie, and how many consecutive heads read each. settled: source layers that are done after this one.
    """

    layer: int
    heads: tuple
    group: int
    own: tuple[int, ...]
    own_groups: tuple[int, ...]
    own_group: int | None
    query_runs: tuple[Run, ...]
    key_runs: tuple[Run, ...]
    key_group: int
    lends: bool
    settled: tuple[int, ...]

    @property
    def reuses(self) -> bool:
        return len(self.own) < len(self.heads)

    @property
    def packs_cache(self) -> bool:
        """A layer that owns every key caches as its family does."""
        return len(self.own_groups) < len(self.heads) // self.group

    @property
    def own_key_of_head(self) -> list[int]:
        """For every own head, the index of its key among the layer's own keys."""
        return [self.own_groups.index(head // self.group) for head in self.own]


def plan_layers(sharing: dict[int, tuple], heads: list[int], groups: list[int]) -> dict[int, LayerPlan]:
    """Plan every layer that reuses or lends.

    sharing: for each reusing layer, per query head, None or (source layer, source head). heads, groups: query heads of
    each layer, and query heads per key/value group. Raises ValueError where the map does not fit the model.
    """
    full = {}
    for layer in range(len(heads)):
        row = sharing.get(layer, (None,) * heads[layer])
        if len(row) != heads[layer]:
            raise ValueError(f"shared_attention: layer {layer} lists {len(row)} heads, the model has {heads[layer]}.")
        full[layer] = tuple(None if source is None else (int(source[0]), int(source[1])) for source in row)
    if unknown := set(sharing) - set(full):
        raise ValueError(f"shared_attention: the model has no layer {min(unknown)}.")
    for layer, row in full.items():
        for head, source in enumerate(row):
            if source is None:
                continue
            if not 0 <= source[0] < layer or not 0 <= source[1] < heads[source[0]] or full[source[0]][source[1]]:
                raise ValueError(
                    f"shared_attention: layer {layer} head {head} reuses layer {source[0]} head {source[1]}, "
                    "which is not an own head of an earlier layer."
                )
    own = {layer: tuple(head for head, source in enumerate(row) if source is None) for layer, row in full.items()}
    own_groups = {layer: tuple(sorted({head // groups[layer] for head in own[layer]})) for layer in full}
    last_use = {source[0]: layer for layer, row in full.items() for source in row if source}

    def place(layer, head):
        """Where the query and the key of this head lie: (layer or None, index among its own heads, and keys)."""
        source = full[layer][head]
        at, index = (layer, head) if source is None else source
        key = own_groups[at].index(index // groups[at])
        return (None if source is None else at), own[at].index(index), key

    plans = {}
    for layer, row in full.items():
        if not any(row) and layer not in last_use:
            continue
        places = [place(layer, head) for head in range(len(row))]
        keys = [(at, key) for at, _, key in places]
        group = groups[layer]
        aligned = all(len(set(keys[start : start + group])) == 1 for start in range(0, len(keys), group))
        sizes = {sum(head // group == kept for head in own[layer]) for kept in own_groups[layer]}
        plans[layer] = LayerPlan(
            layer=layer,
            heads=row,
            group=group,
            own=own[layer],
            own_groups=own_groups[layer],
            own_group=sizes.pop() if len(sizes) == 1 else None,
            query_runs=_runs([(at, query) for at, query, _ in places]),
            key_runs=_runs(keys[::group] if aligned else keys),
            key_group=group if aligned else 1,
            lends=layer in last_use,
            settled=tuple(source for source, last in last_use.items() if last == layer),
        )
    return plans


class _KernelModule:
    """The attention module as an attention function should see it: the real config, and this grouping of heads."""

    def __init__(self, module, group):
        self._module = module
        self.num_key_value_groups = group
        self.config = module.model_config

    def __getattr__(self, name):
        return getattr(self.__dict__["_module"], name)


class _ConfigView:
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


class _PackedCache:
    """A cache that stores the few own keys and all values of a layer in its key slot, heads side by side."""

    def __init__(self, cache):
        self._cache = cache

    def __getattr__(self, name):
        return getattr(self.__dict__["_cache"], name)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        # (B, own groups, t, D) and (B, G, t, D) -> (B, own groups + G, S, D)
        own = key_states.shape[1]
        packed = torch.cat([key_states, value_states], dim=1)
        packed = _store(self._cache, packed, layer_idx, *args, **kwargs)
        return packed[:, :own], packed[:, own:]


def _store(cache, states, layer_idx, *args, **kwargs):
    """Add states to the key slot of a cache, and return all that it holds: (B, ?, t, D) -> (B, ?, S, D)."""
    twice = cache.is_compileable and not _STATIC_CACHE_SIZES_SLOTS_ALONE
    return cache.update(states, states if twice else states[..., :0], layer_idx, *args, **kwargs)[0]


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
    """Mixed into the attention class of a family by `share_attention`: lends own heads, borrows the others'."""

    plan: LayerPlan | None
    names: object  # the Family entry: module names and how the exchange travels

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, **kwargs):
        if self.names.exchange == "positions":
            *position_embeddings, kwargs[EXCHANGE] = position_embeddings
        if self.plan is not None and not self.plan.own:
            return self._reuse(hidden_states, attention_mask, past_key_values, **kwargs)
        if past_key_values is not None and self.plan is not None and self.plan.packs_cache:
            past_key_values = _PackedCache(past_key_values)
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
            value = _store(past_key_values, value, self.layer_idx, *extra)
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


@cache
def _shared_class(attention: type) -> type:
    family = sys.modules[attention.__module__]
    members = {
        "family_eager": staticmethod(getattr(family, "eager_attention_forward", eager_attention)),
        "rotate": staticmethod(getattr(family, "apply_rotary_pos_emb", None)),
        "__module__": __name__,
    }
    return type(f"Shared{attention.__name__}", (SharedAttention, attention), members)


def _keep_heads(module: nn.Module, heads: tuple[int, ...], total: int) -> None:
    """Keep these of `total` heads in every parameter of a projection or per-head norm (rows come head by head)."""
    if isinstance(getattr(module, "norms", None), nn.ModuleList):
        module.norms = nn.ModuleList(module.norms[head] for head in heads)
        return
    for name, parameter in list(module.named_parameters(recurse=False)):
        kept = parameter.detach().unflatten(0, (total, -1))[list(heads)].flatten(0, 1)
        setattr(module, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features = module.weight.shape[0]


def _shrink(attention: nn.Module, plan: LayerPlan, names) -> None:
    """Remove what the reusing heads of a layer do not need."""
    total, groups = len(plan.heads), len(plan.heads) // plan.group
    sides = (
        (names.query, names.query_norm, plan.own, total),
        (names.key, names.key_norm, plan.own_groups, groups),
    )
    for projection, norm, kept, of in sides:
        norm = norm if norm and hasattr(attention, norm) else None
        if not kept:
            delattr(attention, projection)
            if norm:
                delattr(attention, norm)
        elif len(kept) < of:
            _keep_heads(getattr(attention, projection), kept, of)
            if norm and names.norm in ("rows", "list"):
                _keep_heads(getattr(attention, norm), kept, of)
    if names.sinks:
        sinks = getattr(attention, names.sinks)
        delattr(attention, names.sinks)
        if plan.own:
            setattr(attention, names.sinks, nn.Parameter(sinks.detach()[list(plan.own)]))


def _open_exchange(module, args, kwargs):
    kwargs.setdefault(EXCHANGE, Exchange())
    return args, kwargs


def _append_exchange(module, args, output):
    return (*output, Exchange())


def share_attention(model: nn.Module, names, sharing: dict[int, tuple]) -> None:
    """Make a freshly built model share attention, in place.

    names: the model's `Family`. sharing: for each reusing layer, per query head, None or (source layer, source head).
    Raises ValueError where the map does not fit the model.
    """
    layers = model.get_submodule(names.layers)
    attentions = [getattr(layer, names.attention) for layer in layers]
    groups = [getattr(attention, "num_key_value_groups", 1) for attention in attentions]
    heads = [getattr(attention, names.query).weight.shape[0] // attention.head_dim for attention in attentions]
    plans = plan_layers(sharing, heads, groups)
    for layer, attention in enumerate(attentions):
        plan = plans.get(layer)
        if plan is None and names.exchange == "kwargs":
            continue
        attention.__class__ = _shared_class(type(attention))
        attention.plan, attention.names, attention.groups = plan, names, groups[layer]
        attention.model_config = attention.config
        attention.config = _ConfigView(attention.config)
        if plan is not None and plan.reuses:
            _shrink(attention, plan, names)
    stack = model.get_submodule(names.layers.rpartition(".")[0])
    if names.exchange == "positions":
        stack.rotary_emb.register_forward_hook(_append_exchange)
    else:
        stack.register_forward_pre_hook(_open_exchange, with_kwargs=True)
