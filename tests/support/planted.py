"""Tiny models in which it is known what sharing costs: later heads whose attention is an exact copy of earlier ones'.

Layer 0 writes nothing into the residual stream, so layer 1 sees the same input; its normalisation and any of its
queries and keys can then be copies of layer 0's, in any order, while its values and its output stay its own. The other
layers are random, with attention sharp enough that another source is costly.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import save_tiny, save_tokenizer

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "attention_bias": False}
GROUP = 2
"""Query heads of a KV group."""


def save_planted(folder: Path, groups: dict[int, int], seed: int = 0) -> Path:
    """groups: KV group of layer 1 -> the group of layer 0 whose queries and keys it copies."""
    save_tiny("llama", folder, seed=seed, max_shard_size="10GB", **SIZES)
    save_tokenizer(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first, second = ("model.layers.0.", "model.layers.1.")
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = tensors[name] * 3
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[first + name] = torch.zeros_like(tensors[first + name])
    tensors[second + "input_layernorm.weight"] = tensors[first + "input_layernorm.weight"].clone()
    for target, source in groups.items():
        for name, heads in (("self_attn.q_proj.weight", GROUP), ("self_attn.k_proj.weight", 1)):
            size = heads * 16
            copied = tensors[first + name][source * size : (source + 1) * size]
            tensors[second + name][target * size : (target + 1) * size] = copied
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def found_map(folder: Path) -> dict[str, list]:
    """The sources of all heads of each layer that a conversion wrote into config.json."""
    layers = json.loads((folder / "config.json").read_text())["shared_attention"]["layers"]
    own, groups = {"share": [None] * GROUP}, range(SIZES["num_key_value_heads"])
    return {
        label: [source for group in groups for source in planned.get(str(group), own)["share"]]
        for label, planned in layers.items()
    }


def save_reader(folder: Path, layer: int, group: int, seed: int = 0) -> Path:
    """A model in which one KV group alone reads what is far back: its heads attend to all tokens alike, and what they
    put out counts for much. What all others do counts for little."""
    save_tiny("llama", folder, seed=seed, max_shard_size="10GB", **SIZES)
    save_tokenizer(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("o_proj.weight"):
            tensors[name] = tensors[name] * 0.02
    size = GROUP * 16
    heads = slice(group * size, (group + 1) * size)
    tensors[f"model.layers.{layer}.self_attn.q_proj.weight"][heads] = 0
    tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:, heads] *= 300
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
