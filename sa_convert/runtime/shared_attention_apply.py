"""Makes a freshly built model of a family share attention: its attention modules lose heads and learn to borrow."""

import sys
from functools import cache, partial

from torch import nn

from .shared_attention import SharedAttention
from .shared_attention_arguments import Arguments, unlike
from .shared_attention_attend import FORMS, ConfigView
from .shared_attention_exchange import open_by_keyword, open_by_positions, open_by_thread, see_input
from .shared_attention_modules import MODULES
from .shared_attention_plan import LayerPlan, plan_layers
from .shared_attention_weights import eager_attention

_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@cache
def shared_class(attention: type, names) -> type:
    """The attention class of a family that shares: ours, then the family's own."""
    family = sys.modules[attention.__module__]
    eager = getattr(family, "eager_attention_forward", eager_attention)
    rotate = getattr(family, "apply_rotary_pos_emb", None)
    ours = MODULES[names.module] if names.module else SharedAttention
    rotates = names.rotary != "none" and names.plain_forward
    if rotates and rotate is None:
        raise RuntimeError(unlike(f"the module of {attention.__name__} has no apply_rotary_pos_emb"))
    needs = ("mask", *ours.needs, *(() if names.bidirectional else ("cache",)))
    needs += ("positions",) if names.exchange == "positions" or (rotates and not names.module) else ()
    members = {
        "family_eager": staticmethod(eager_attention if names.fused or names.module else eager),
        "rotate": staticmethod(rotate),
        "arguments": Arguments(attention, needs),
        "__module__": __name__,
        # The class is no attribute of its module, so an instance is pickled by what the class is made of.
        "__reduce__": lambda self: (_unmade, (attention, names), self.__dict__),
    }
    return type(f"Shared{attention.__name__}", (_Loading, ours, attention), members)


def _unmade(attention: type, names) -> nn.Module:
    """An attention module that shares, before pickle or copy give it its attributes."""
    ours = shared_class(attention, names)
    return ours.__new__(ours)


class _Loading(nn.Module):
    """What `load_state_dict` does in a layer that reuses attention: tensors made for the base model are refused."""

    def _load_from_state_dict(self, state_dict, prefix, *others):
        errors = others[-1]
        for name in self._misfits(state_dict, prefix) if self.plan and self.plan.reuses else ():
            del state_dict[name]
            if not any(_MISFIT in error for error in errors):
                errors.append(f"{name} does not fit: layer {self.plan.layer} {_MISFIT}")
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _misfits(self, state_dict, prefix):
        names = self.names
        removed = {names.query, names.key, names.query_norm, names.key_norm, names.sinks} - set(dir(self))
        shapes = {prefix + name: parameter.shape for name, parameter in self.named_parameters()}
        within = [name for name in state_dict if name.startswith(prefix)]
        gone = [name for name in within if name.removeprefix(prefix).partition(".")[0] in removed]
        return gone + [name for name in within if shapes.get(name, state_dict[name].shape) != state_dict[name].shape]


_MISFIT = (
    "reuses attention, so it lacks queries and keys that its base model has. Train an adapter on the converted model, "
    "or merge that of the base into the base before it is converted; one of values and outputs alone fits both."
)


def _keep_first(module: nn.Module, kept: int, axis: int) -> None:
    """Keep so many rows of a projection; which ones does not matter, since the checkpoint fills them."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        cut = parameter.detach().narrow(axis if parameter.ndim > 1 else 0, 0, kept).clone()
        setattr(module, name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features = kept
    elif hasattr(module, "nf"):  # Conv1D
        module.nf = kept


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


def _shrink(attention: nn.Module, plan: LayerPlan, names, size: int) -> None:
    """Remove what the reusing heads of a layer do not need."""
    total, groups = len(plan.heads), len(plan.heads) // plan.group
    if names.fused:
        kept = (len(plan.own) + len(plan.own_groups) + groups) * size
        _keep_first(getattr(attention, names.fused), kept, 1 if names.transposed else 0)
        for norm in (names.query_norm, names.key_norm):
            if norm and not plan.own and hasattr(attention, norm):
                delattr(attention, norm)
        return
    if names.gate == "query":
        _keep_first(getattr(attention, names.query), (len(plan.own) + total) * size, 0)
    sides = (
        (names.query, names.query_norm, plan.own, total),
        (names.key, names.key_norm, plan.own_groups, groups),
    )
    for projection, norm, kept, of in sides:
        norm = norm if norm and hasattr(attention, norm) else None
        gated = projection == names.query and names.gate == "query"
        if not kept:
            if not gated:
                delattr(attention, projection)
            if norm:
                delattr(attention, norm)
        elif len(kept) < of:
            if not gated:
                _keep_heads(getattr(attention, projection), kept, of)
            if norm and names.norm in ("rows", "list"):
                _keep_heads(getattr(attention, norm), kept, of)
    if names.sinks:
        sinks = getattr(attention, names.sinks)
        delattr(attention, names.sinks)
        if plan.own:
            setattr(attention, names.sinks, nn.Parameter(sinks.detach()[list(plan.own)]))


def shape_of(attention: nn.Module, names, stack, config) -> tuple[int, int, int]:
    """Query heads, query heads per key/value group, and head size of an attention module."""
    size = next(getattr(attention, name) for name in _HEAD_SIZES if hasattr(attention, name))
    axis = 1 if names.transposed else 0
    if names.fused:
        heads = getattr(config, stack.heads)
        groups = (getattr(attention, names.fused).weight.shape[axis] // size - heads) // 2
        return heads, heads // groups, size
    heads, groups = (getattr(attention, name).weight.shape[axis] // size for name in (names.query, names.key))
    heads = heads // 2 if names.gate == "query" else heads
    return heads, heads // groups, size


def path_in(model: nn.Module, path: str) -> str | None:
    """Where a model has this part, or None. The path is that in a language model, and may begin with the name of the
    base model: a model without a head lacks that name, and some heads have another."""
    rest, base = path.partition(".")[2], model.base_model_prefix
    return next((found for found in (path, rest, f"{base}.{rest}", f"{base}.{path}") if has_part(model, found)), None)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """A part of a model by its path in a language model. Raises AttributeError where there is none."""
    return model.get_submodule(path_in(model, path) or path)


def attentions_of(model: nn.Module, names, stack) -> list[nn.Module | None]:
    """The attention modules of a stack, layer by layer; None in layers without softmax attention."""
    layers = submodule(model, stack.layers)
    found = [layer.get_submodule(stack.attention) if has_part(layer, stack.attention) else None for layer in layers]
    return [module if module is not None and hasattr(module, names.fused or names.query) else None for module in found]


def has_part(module: nn.Module, path: str) -> bool:
    """Whether there is such a part; some layers name a part that they lack, as None."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True


def _rows_of(stack: str, layers: dict) -> dict[int, tuple]:
    """The part of the map that is about one stack: {"decoder.3": [...]} -> {3: (...)}."""
    rows = {}
    for label, heads in layers.items():
        name, _, number = str(label).rpartition(".")
        if name == stack:
            rows[int(number)] = tuple(source if source is None else tuple(source) for source in heads)
    return rows


def share_attention(model: nn.Module, names, sharing: dict) -> None:
    """Make a freshly built model share attention, in place.

    names: the model's `Family`. sharing: `shared_attention` of its config; `layers` has for each reusing layer, per
    query head, None or (source layer, source head). Raises ValueError where the map does not fit the model.
    """
    layers = sharing["layers"]
    if sharing.get("form", "auto") not in FORMS:
        raise ValueError(f"shared_attention: form is {sharing['form']!r}, but should be one of {', '.join(FORMS)}.")
    known = {stack.name for stack in names.all_stacks}
    for label in layers:
        if str(label).rpartition(".")[0] not in known:
            raise ValueError(f"shared_attention: the model has no layer {label}.")
    # An encoder or a decoder may stand alone: what the map says of the other one is not for this model.
    stacks = [stack for stack in names.all_stacks if not names.encoder_decoder or path_in(model, stack.layers)]
    opened = set()
    for stack in stacks:
        if _share_stack(model, names, stack, sharing):
            opened.add((path_in(model, stack.layers) or stack.layers).rpartition(".")[0])
    for path in sorted(opened):
        _open_exchange(model.get_submodule(path), names, is_model=not path)
    _keep_heads_together(model, names, stacks, layers)


def _keep_heads_together(model: nn.Module, names, stacks, layers: dict) -> None:
    """Tensor parallelism gives each process some of the heads, of every layer the same. Where a head reuses one of
    another number, attention is therefore left whole in each process; all else is divided as in the base."""
    spans = all(source and source[1] == head for row in layers.values() for head, source in enumerate(row))
    plan = getattr(model, "tp_plan", None)
    if not plan or (spans and not names.fused and not names.gate):
        return
    whole = tuple(f"{path_in(model, stack.layers) or stack.layers}.*.{stack.attention}." for stack in stacks)
    model.tp_plan = {rule: style for rule, style in plan.items() if not rule.startswith(whole)}


def _share_stack(model: nn.Module, names, stack, sharing: dict) -> bool:
    """Whether anything in the stack is shared."""
    attentions = attentions_of(model, names, stack)
    configs = [getattr(attention, "config", model.config) for attention in attentions]
    shapes = [
        (0, 1, 0) if attention is None else shape_of(attention, names, stack, config)
        for attention, config in zip(attentions, configs, strict=True)
    ]
    # A model may be made of its first layers alone (`num_hidden_layers`), whose sources come before them.
    rows = {layer: row for layer, row in _rows_of(stack.name, sharing["layers"]).items() if layer < len(attentions)}
    plans = plan_layers(rows, [heads for heads, _, _ in shapes], [group for _, group, _ in shapes])
    for layer, attention in enumerate(attentions):
        plan = plans.get(layer)
        if attention is None or (plan is None and names.exchange != "positions"):
            continue
        attention.__class__ = shared_class(type(attention), names)
        attention.plan, attention.names, attention.stack, attention.sharing = plan, names, stack.name, sharing
        _, attention.group, attention.size = shapes[layer]
        attention.model_config = configs[layer]
        attention.config = ConfigView(configs[layer])
        if not hasattr(attention, "is_causal"):  # kernels take it for granted where a module does not say
            attention.is_causal = not names.bidirectional or getattr(configs[layer], "is_decoder", False)
        if plan is not None and plan.lends:
            see = partial(see_input, stack.name, layer)
            submodule(model, stack.layers)[layer].register_forward_pre_hook(see, with_kwargs=True)
        if plan is not None and plan.reuses:
            # Families initialise by name what a layer may have lost (T5, GPT-OSS until 5.2); it was done before.
            attention._is_hf_initialized = True
            _shrink(attention, plan, names, attention.size)
            if not plan.own and stack.query_input:
                _freeze(submodule(model, stack.layers)[layer].get_submodule(stack.query_input))
    return bool(plans)


def _freeze(module: nn.Module) -> None:
    """Make buffers of parameters that nothing reads: files keep them, and no optimizer waits for their gradients."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())


def _open_exchange(stack: nn.Module, names, is_model: bool) -> None:
    if names.exchange == "positions":
        open_by_positions(stack, stack.rotary_emb, is_model)
    elif names.exchange == "context":
        open_by_thread(stack, lambda module: isinstance(module, SharedAttention), is_model)
    else:
        open_by_keyword(stack, is_model)
