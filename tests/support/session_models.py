"""Models of every kind whose caches sessions keep: bases, and conversions by each treatment, alone and together."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import DynamicCache, StaticCache

from support.low_rank_models import convert
from support.memory_models import made
from support.tiny_models import load_converted, with_cache
from support.whole_layers import convert_layers
from support.windowed_models import EVERY, MIXED, Pair

WINDOW = {"window": {"sinks": 2, "tokens": 5}}
_folders = TemporaryDirectory(prefix="sessions-")


def _beside(family):
    """Low-rank keys, a window and full KV groups in one layer, windows in another, borrowed keys in a third."""
    more = {1: {1: WINDOW}, 3: {0: WINDOW}, 4: {0: {"share": [[0, 0], [0, 1]]}}}
    root = Path(_folders.name) / f"beside-{family}"
    found = convert(root, family, {1: {0: 7, 3: 7}, 2: {2: 6}, 4: {3: 5}}, more)
    return load_converted(found.folder, dtype=torch.float32)


def _layers(name, family, layers):
    return load_converted(convert_layers(Path(_folders.name) / name, family, layers))


MODELS = {
    "base": lambda: made("llama", share=False),
    "base, sliding": lambda: made("gemma3_text", share=False),
    "base, hybrid": lambda: made("qwen3_next", share=False),
    "share": lambda: made("llama"),
    "some windows": lambda: Pair("llama", MIXED).model,
    "windows": lambda: Pair("llama", EVERY).model,
    "windows, sliding": lambda: Pair("gemma3_text", MIXED).model,
    "low rank, windows, share": lambda: _beside("llama"),
    "low rank, norms": lambda: _beside("qwen3"),
    "drop": lambda: _layers("drop", "llama", {0: "drop", 2: "drop"}),
    "merge": lambda: _layers("merge", "llama", {0: "merge", 2: "{merge: {groups: 2}}"}),
}


@cache
def model_named(name):
    return MODELS[name]()


def new_cache(model, kind, room=48):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=room)
    return DynamicCache(config=model.config)


@torch.no_grad()
def read(model, cache, ids, pieces, mask=None):
    """Logits of tokens (B, T) after those that the cache has, in pieces of so many tokens. mask: of all tokens."""
    found, start = [], int(cache.get_seq_length())
    before = start
    for count in pieces:
        given = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            given = {"attention_mask": mask[:, : start + count], "position_ids": positions[:, start : start + count]}
        found.append(model(ids[:, start - before : start - before + count], **with_cache(model, cache), **given).logits)
        start += count
    return torch.cat(found, dim=1)
