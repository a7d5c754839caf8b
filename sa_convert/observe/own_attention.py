"""Families whose own code does not call the attention interface run ours while they are probed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sa_convert.observe.attention_call import Call

if TYPE_CHECKING:
    from sa_convert.observe.probe import Probe
    from sa_convert.runtime.shared_attention_plan import LayerPlan


def replace(probe: "Probe") -> None:
    """Give every attention module of the probe's model our class, with all its own heads, and the probe's function."""
    from sa_convert.runtime.shared_attention_apply import shape_of, shared_class

    modules, stack = probe.family.modules, probe.family.all_stacks[0]
    for layer, attention in enumerate(probe.attentions):
        config = getattr(attention, "config", probe.model.config)
        heads, attention.group, attention.size = shape_of(attention, modules, stack, config)
        attention.plan = _whole(layer, heads, attention.group)
        attention.names, attention.stack = modules, ""
        attention.model_config, attention.num_key_value_groups = config, attention.group
        own: Any = type(attention)
        with _unhooked(attention):
            attention.__class__ = _probed(shared_class(own, modules))


def _whole(layer: int, heads: int, group: int) -> "LayerPlan":
    """The plan of a layer that owns all its attention and lends none."""
    from sa_convert.runtime.shared_attention_plan import LayerPlan

    every, groups = tuple(range(heads)), tuple(range(heads // group))
    return LayerPlan(layer, (None,) * heads, group, every, groups, group, (), (), group, False, ())


def _probed(shared: type) -> type:
    """Our attention class, whose attention function is the probe's."""

    def attend(
        self: Any, exchange: Any, implementation: str, query: Any, key: Any, value: Any, mask: Any, arguments: Any
    ) -> Any:
        added = _eager_mask(mask, query, key)
        call = Call(module=self, query=query, key=key, mask=added, arguments=arguments)
        return self.sa_convert_probe.attend(call, value)

    return type(f"Probed{shared.__name__}", (shared,), {"attend": attend})


def _eager_mask(mask: Any, query: Any, key: Any) -> Any:
    """A mask that is added to scores, from what a causal model hands to its kernel: boolean, or none at all."""
    from sa_convert.runtime.shared_attention_weights import additive

    tokens, length = query.shape[-2], key.shape[-2]
    if mask is None:
        mask = torch.ones(1, 1, tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
    return additive(mask, query, length)


@contextmanager
def _unhooked(module: Any) -> Iterator[None]:
    """Hooks of accelerate, which fetch weights from the disk, hold on to the module's forward as it was."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    module.__dict__.pop("forward", None)  # it put that there, and it is the former class's
    yield
    add_hook_to_module(module, hook)
