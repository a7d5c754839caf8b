"""Attention layers of vLLM for the parts of a layer of the model."""

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from .backend import WindowBackend
from .pages import SinkWindowSpec


class WindowAttention(Attention):
    """KV groups with a window. pages: the class of pages that they keep."""

    def __init__(self, *, window, pages, limit, **kwargs):
        kwargs["per_layer_sliding_window"] = window.tokens
        super().__init__(attn_backend=WindowBackend, first=window.sinks, limit=limit, **kwargs)
        self.pages = pages

    def get_kv_cache_spec(self, vllm_config):
        return SinkWindowSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            sliding_window=self.pages.tokens,
            sinks=self.pages.sinks,
        )


class NarrowAttention(Attention):
    """A layer whose values are narrower than its keys. width: numbers in a value of a head."""

    def __init__(self, *, width, **kwargs):
        super().__init__(attn_backend=WindowBackend, head_size_v=width, value_size=width, **kwargs)

    def forward(self, query, key, value):
        """query (T, H D); key and value (T, G D), the values filled up with zeros. Returns (T, H D), so too."""
        value = value.unflatten(-1, (self.num_kv_heads, -1))[..., : self.head_size_v].flatten(1)
        output = super().forward(query, key, value).unflatten(-1, (self.num_heads, -1))
        return nn.functional.pad(output, (0, self.head_size - self.head_size_v)).flatten(1)


class SplitAttention(nn.Module):
    """One attention layer of the model as several of vLLM, each with some of its KV groups."""

    def __init__(self, parts, size):
        """parts: (first KV group, layer of vLLM), in order. size: numbers in a head."""
        super().__init__()
        self.parts = nn.ModuleList(layer for _, layer in parts)
        self.keys = [(first * size, (first + layer.num_kv_heads) * size) for first, layer in parts]
        self.group = parts[0][1].num_heads // parts[0][1].num_kv_heads

    def forward(self, query, key, value):
        """query (T, H D); key, value (T, G D). Returns (T, H D)."""
        outputs = []
        for part, (start, stop) in zip(self.parts, self.keys, strict=True):
            queries = query[:, start * self.group : stop * self.group]
            given = (states.contiguous() for states in (queries, key[:, start:stop], value[:, start:stop]))
            outputs.append(part(*given))
        return torch.cat(outputs, dim=-1)
