"""Attention over sinks and a window in vLLM's pages, in plain torch: no kernel of vLLM's sees both at once.

Shapes: T tokens, H query heads, G KV groups, D head size, B requests, N keys that a query can see.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.registry import register_backend

BLOCK = 256
"""Queries of a prompt that are computed at one time, so that a mask is never tokens times tokens."""

EVERY = 1 << 40
"""A window that is longer than any text."""


@register_backend("SA_CONVERT_WINDOW")
class WindowBackend(AttentionBackend):
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(1)]

    @staticmethod
    def get_name():
        return "SA_CONVERT_WINDOW"

    @staticmethod
    def get_impl_cls():
        return WindowImpl

    @staticmethod
    def get_builder_cls():
        return WindowBuilder

    @classmethod
    def supports_sliding_window(cls):
        return True


@dataclass
class WindowMetadata:
    """One step of a group of layers. starts: where each request's queries begin, and where the last ends. lengths: of
    each request's text, the new tokens included. table: (B, pages). slots: (T,) of the new tokens. known: what layers
    have worked out for the others."""

    starts: list[int]
    lengths: list[int]
    table: torch.Tensor
    slots: torch.Tensor
    known: dict = field(default_factory=dict)

    @property
    def tokens(self):
        return self.starts[-1]

    @property
    def decodes(self):
        """Whether every request computes one token."""
        return self.tokens == len(self.lengths)


class WindowBuilder(AttentionMetadataBuilder[WindowMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        told, requests = common_attn_metadata, common_attn_metadata.num_reqs
        return WindowMetadata(
            starts=told.query_start_loc_cpu[: requests + 1].tolist(),
            lengths=told.seq_lens[:requests].tolist(),
            table=told.block_table_tensor[:requests].long(),
            slots=told.slot_mapping,
        )


class WindowImpl(AttentionImpl):
    """sliding_window: None if every token is seen. first: how many tokens of a text always are. limit: a window of the
    family's own besides, or None. value_size: numbers in a value, None: as many as in a key."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype,
        logits_soft_cap=None, attn_type="decoder", kv_sharing_target_layer_name=None,
        first=0, limit=None, value_size=None,
    ):  # fmt: skip
        self.num_heads, self.head_size, self.num_kv_heads, self.scale = num_heads, head_size, num_kv_heads, float(scale)
        self.kv_cache_dtype, self.attn_type = kv_cache_dtype, attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sliding_window = EVERY if sliding_window is None else sliding_window
        self.sizes = head_size, value_size or head_size
        self.first, self.limit = first, limit

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """query (T, H, D); key, value (T, G, D); kv_cache (pages, G, tokens in a page, 2 D). Fills output (T, H, D)."""
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        told, tokens = attn_metadata, attn_metadata.tokens
        size = kv_cache.shape[2]
        slots = told.slots[:tokens]
        kv_cache[slots // size, :, slots % size] = torch.cat([key[:tokens], value[:tokens]], dim=-1).to(kv_cache.dtype)
        if told.decodes:
            self._one_token(query[:tokens], kv_cache, told, output)
            return output
        for row, (begin, end) in enumerate(zip(told.starts, told.starts[1:], strict=False)):
            for start in range(begin, end, BLOCK):
                stop, place = min(start + BLOCK, end), told.lengths[row] - end + start
                output[start:stop] = self._block(query[start:stop], kv_cache, told, row, place)
        return output

    def _read(self, kv_cache, pages, places):
        """Keys and values (B, G, N, D) of the tokens at these places. pages: (B, pages of a request)."""
        size = kv_cache.shape[2]
        states = kv_cache[pages.gather(1, places // size), :, places % size].transpose(1, 2)
        return states.split(self.sizes, dim=-1)

    def _one_token(self, query, kv_cache, told, output):
        places, mask = self._places(told, kv_cache.device)
        key, value = self._read(kv_cache, told.table, places)
        query = query.unflatten(1, (self.num_kv_heads, -1)).to(key.dtype)  # heads of a KV group, as so many tokens
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        output[: len(query)] = found.flatten(1, 2)

    def _places(self, told, device):
        """Which tokens each request's new token sees, (B, N), and which of those are there, (B, 1, 1, N), or None."""
        window = self.sliding_window if self.limit is None else min(self.sliding_window, self.limit)
        name = self.first, window, self.limit
        if name not in told.known:
            lengths = torch.tensor(told.lengths, device=device)[:, None]
            longest = max(told.lengths)
            sinks = torch.arange(min(self.first, longest), device=device).expand(len(lengths), -1)
            near = lengths - min(window, longest) + torch.arange(min(window, longest), device=device)
            there = [sinks < lengths, near >= sinks.shape[1]]  # a sink is seen once
            if self.limit is not None:
                there[0] = there[0] & (lengths - 1 - sinks < self.limit)
            there, places = torch.cat(there, dim=1), torch.cat([sinks, near], dim=1)
            # What is not there may be anything in memory, even no number: the new token stands in for it.
            places = torch.where(there, places, lengths - 1)
            told.known[name] = places, None if bool(there.all()) else there[:, None, None]
        return told.known[name]

    def _block(self, query, kv_cache, told, row, start):
        """Output (R, H, D) of R tokens of one request, the first of which is at place `start`."""
        window = self.sliding_window if self.limit is None else min(self.sliding_window, self.limit)
        low, stop = max(start - window + 1, 0), start + len(query)
        places = torch.cat([torch.arange(min(self.first, low)), torch.arange(low, stop)]).to(kv_cache.device)
        key, value = self._read(kv_cache, told.table[row : row + 1], places[None])
        ago = torch.arange(start, stop, device=places.device)[:, None] - places
        seen = (ago >= 0) & ((ago < self.sliding_window) | (places < self.first))
        if self.limit is not None:
            seen &= ago < self.limit
        group = self.num_heads // self.num_kv_heads
        key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
        query = query.transpose(0, 1)[None].to(key.dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scale)[0].transpose(0, 1)
