"""Families whose own code does not call the attention interface run ours while they are probed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sa_convert.models.attention_class import attention_class_of
from sa_convert.observe.attention_call import Call

if TYPE_CHECKING:
    from sa_convert.observe.probe import Probe


def replace(probe: "Probe") -> None:
    """Give every attention module of the probe's model our class, with all its own heads, and the probe's function."""
    from types import SimpleNamespace

    from sa_convert.runtime.modeling_shared_attention import MODULES

    modules = probe.family.modules
    ours, stack = attention_class_of(modules), probe.family.all_stacks[0]
    names = SimpleNamespace(**{**MODULES, **modules.to_json()})
    for layer, attention in enumerate(probe.attentions):
        config = getattr(attention, "config", probe.model.config)
        heads, group, size = ours.shape_of(attention, names, getattr(config, stack.heads, None))  # type: ignore[attr-defined]
        own: Any = type(attention)
        with _unhooked(attention):
            attention.__class__ = _probed(ours, own)
        attention.plan = ours.plan_class("", layer, heads, group)  # type: ignore[attr-defined]
        attention.plan.treatments = (_PROBE,)
        attention.names, attention.size, attention.model_config = names, size, config
        attention.num_key_value_groups = group
        attention.prepare()


PROBED = "Probed"
"""Before the name of a family's attention class in that of ours."""

_PROBE = object()
"""Stands for the treatments of a probed layer: the probe."""


def _probed(ours: type, own: type) -> type:
    """Our attention class before a family's own, whose attention function is the probe's."""

    def attend(self: Any, query: Any, key: Any, value: Any, mask: Any, arguments: Any, exchange: Any) -> Any:
        added = _eager_mask(mask, query, key)
        call = Call(module=self, query=query, key=key, mask=added, arguments=arguments)
        return self.sa_convert_probe.attend(call, value)

    return type(f"{PROBED}{own.__name__}", (type(PROBED, (ours,), {"attend": attend}), own), {})


def _eager_mask(mask: Any, query: Any, key: Any) -> Any:
    """A mask that is added to scores, from what a causal model hands to its kernel: boolean, or none at all."""

    tokens, length = query.shape[-2], key.shape[-2]
    if mask is None:
        mask = torch.ones(1, 1, tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
    mask = mask[..., :length]
    if mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, least)


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
