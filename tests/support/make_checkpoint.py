"""Synthetic safetensors checkpoints, written without torch: any dtype, any order of tensors, any size."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sa_convert.domain.checkpoint import DTYPE_BITS

_BLOCK = 4 * 1024 * 1024


@dataclass(frozen=True)
class Fake:
    """A tensor to write. data: its bytes; None: random ones."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_raw(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header, right or wrong; length: what the file says its header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def write_safetensors(
    file: Path,
    tensors: Mapping[str, Fake],
    metadata: Mapping[str, str] | None = None,
    sparse: bool = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Write the tensors in their order. sparse: zeros that take no disk. names: the order of the header instead."""
    entries, position = {}, 0
    for name, fake in tensors.items():
        entries[name] = {
            "dtype": fake.dtype,
            "shape": list(fake.shape),
            "data_offsets": [position, position + fake.bytes],
        }
        position += fake.bytes
    header = {} if metadata is None else {"__metadata__": dict(metadata)}
    header |= {name: entries[name] for name in names or entries}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    block = random.Random(seed).randbytes(min(_BLOCK, max(position, 1)))
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            stream.truncate(8 + len(text) + position)
            return file
        for fake in tensors.values():
            left = fake.bytes
            while left:
                piece = fake.data if fake.data is not None else block[: min(left, len(block))]
                stream.write(piece)
                left -= len(piece)
    return file


def llama_config(layers: int, hidden: int, heads: int, groups: int, intermediate: int, vocabulary: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def llama_tensors(config: Mapping[str, int], dtype: str = "BF16") -> dict[str, Fake]:
    """All tensors of a Llama of this configuration, by layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        shapes[f"{start}input_layernorm.weight"] = (hidden,)
        for name, shape in (("down", (hidden, inner)), ("gate", (inner, hidden)), ("up", (inner, hidden))):
            shapes[f"{start}mlp.{name}_proj.weight"] = shape
        shapes[f"{start}post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("k", narrow), ("o", hidden), ("q", hidden), ("v", narrow)):
            shapes[f"{start}self_attn.{name}_proj.weight"] = (rows, hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {name: Fake(dtype, shape) for name, shape in shapes.items()}


def write_model(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Fake],
    shards: int | None = None,
    sparse: bool = False,
) -> Path:
    """A model folder. shards: split into so many files of much the same size, with an index; None: a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards is None:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, sparse)
        return folder
    total = sum(fake.bytes for fake in tensors.values())
    weight_map: dict[str, str] = {}
    parts: list[dict[str, Fake]] = [{} for _ in range(shards)]
    position = 0
    for name, fake in tensors.items():
        part = min(position * shards // total, shards - 1)
        parts[part][name] = fake
        weight_map[name] = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        position += fake.bytes
    for part, content in enumerate(parts):
        file = folder / f"model-{part + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(file, content, {"format": "pt"}, sparse, seed=part)
    index = {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in sorted(weight_map)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def tiny_llama(folder: Path, shards: int | None = None, **changes: int) -> Path:
    """A small Llama folder: 4 layers, 4 query heads of 8, 2 KV groups."""
    sizes = {"layers": 4, "hidden": 32, "heads": 4, "groups": 2, "intermediate": 64, "vocabulary": 48} | changes
    config = llama_config(**sizes)
    return write_model(folder, config, llama_tensors(config), shards)  # type: ignore[arg-type]
