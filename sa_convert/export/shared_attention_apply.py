"""Makes a freshly built model of a family share attention: its attention modules lose heads and learn to borrow."""

import sys
from functools import cache

from torch import nn

from .shared_attention import EXCHANGE, ConfigView, Exchange, SharedAttention, eager_attention
from .shared_attention_plan import LayerPlan, plan_layers


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
        attention.config = ConfigView(attention.config)
        if plan is not None and plan.reuses:
            _shrink(attention, plan, names)
    stack = model.get_submodule(names.layers.rpartition(".")[0])
    if names.exchange == "positions":
        stack.rotary_emb.register_forward_hook(_append_exchange)
    else:
        stack.register_forward_pre_hook(_open_exchange, with_kwargs=True)
