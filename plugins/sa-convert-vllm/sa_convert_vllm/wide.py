"""Layers that reuse another's attention as a whole keep values alone: in the pages of their source, which are wider.

    an ordinary page, and that of a source with two borrowers (K, V: all tokens of the page)

    K | V                K | V of the source | V of the first | V of the second

Kernels take keys and values as two tensors of equal strides, so every part of a wide page serves any of them. What a
borrower writes is its values, and the source's keys once more, where they are.
"""

import dataclasses

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op


class Slots:
    """A wide page as an attention implementation reads an ordinary one, before it has keys and values apart."""

    def __init__(self, pages, size, slot):
        """pages: (pages, KV groups, tokens, parts * size). slot: whose values, 0 for the source's."""
        self.pages, self.head, self.slot, self.parts = pages, size, slot, pages.shape[-1] // size

    def _of(self, pages):
        made = object.__new__(Slots)
        made.__dict__.update(self.__dict__, pages=pages)
        return made

    def size(self):
        return (*self.pages.shape[:-1], 2 * self.head)

    def view(self, shape):
        return self._of(self.pages.view(shape[0], shape[1], -1, self.head))

    def transpose(self, *axes):
        return self._of(self.pages.transpose(*axes))

    def chunk(self, parts, dim):
        found = self.pages.chunk(self.parts, dim)
        return found[0], found[1 + self.slot]

    def split(self, size, dim):
        found = self.pages.split(size, dim)
        return found[0], found[1 + self.slot]


def attend_in_slot(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerNameType,
    slot: int,
) -> None:
    metadata, source, pages, slots = get_attention_context(_resolve_layer_name(layer_name))
    if metadata is None:  # vLLM measures memory
        output.zero_()
        return
    pages = Slots(pages, source.head_size, slot)
    if not source.attn_backend.forward_includes_kv_cache_update:
        source.impl.do_kv_cache_update(source, key, value, pages, slots)
    source.impl.forward(source, query, key, value, pages, metadata, output=output)


def _nothing(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerNameType,
    slot: int,
) -> None:
    """What a compiler sees."""


direct_register_custom_op(
    op_name="sa_convert_attend_in_slot", op_func=attend_in_slot, mutates_args=["output"], fake_impl=_nothing
)


def _run(source, slot, query, key, value):
    """(T, H D), (T, G D) twice -> (T, H D)"""
    query = query.view(-1, source.num_heads, source.head_size)
    key, value = (states.reshape(-1, source.num_kv_heads, source.head_size) for states in (key, value))
    output = torch.empty_like(query)
    name = _encode_layer_name(source.layer_name)
    torch.ops.vllm.sa_convert_attend_in_slot(query, key, value, output, name, slot)
    return output.flatten(1)


class SourceAttention(Attention):
    """A layer whose attention others reuse. borrowers: how many do."""

    def __init__(self, *, borrowers, **kwargs):
        super().__init__(**kwargs)
        self.borrowers = borrowers

    def forward(self, query, key, value):
        return _run(self, 0, query, key, value)

    def get_kv_cache_spec(self, vllm_config):
        spec = super().get_kv_cache_spec(vllm_config)
        return dataclasses.replace(spec, head_size_v=(1 + self.borrowers) * self.head_size)


class BorrowedAttention(nn.Module):
    """A layer that reuses another's: the folder's code hands it that one's queries and keys."""

    def __init__(self, source, slot):
        super().__init__()
        self.__dict__["source"] = source  # no part of this one
        self.slot = slot

    def forward(self, query, key, value):
        return _run(self.source, self.slot, query, key, value)
