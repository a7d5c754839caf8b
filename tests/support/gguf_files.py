"""Small .gguf files as llama.cpp's convert_hf_to_gguf.py writes them, from models of transformers.

Names come from the gguf package, which that converter uses, and not from our own tables.
"""

import gguf
import numpy
import torch
from tokenizers import pre_tokenizers

VOCABULARY = 320


def write_gguf(file, architecture, model, keys, extra=None, without=(), tokenizer=True, biases=None):
    """Writes `model` as a file of an architecture.

    keys: metadata without the architecture's name, beside those of every model. extra: further tensors by their GGUF
    names. without: GGUF names of tensors to leave out. biases: further tensors of the model's state, by their names.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    for key, value in {"vocab_size": config.vocab_size, **keys}.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if getattr(config, name, None) is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", getattr(config, name))
    if tokenizer:
        add_tokenizer(writer, config.vocab_size)
    names = _names(architecture, config)
    tensors = {}
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if architecture != "t5" and config.tie_word_embeddings:
        copies.add("lm_head.weight")
    for name, tensor in {**model.state_dict(), **(biases or {})}.items():
        if name in copies:
            continue
        for found, numbers in _as_llama_cpp(architecture, config, name, tensor.detach().float().numpy()):
            stem, dot, ending = found.rpartition(".")
            if ending not in ("weight", "bias"):
                stem, dot, ending = found, "", ""
            known = names.get_name(stem)
            assert known, found
            tensors.setdefault(known + (dot + ending if dot else _ending(known)), numbers)
    for name, numbers in {**tensors, **(extra or {})}.items():
        if name not in without:
            writer.add_tensor(name, numpy.ascontiguousarray(numbers, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer, size):
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "oa"]
    words += [f"[{number}]" for number in range(size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["o a"])


def interleaved(rows, heads):
    """Rows of queries or keys as llama.cpp orders them for Llama: the two halves of a head side by side."""
    shape = (heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape)


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _names(architecture, config):
    number = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, getattr(config, "num_hidden_layers", 0) or config.num_layers)


def _ending(name):
    return "" if name.endswith("ssm_a") else ".bias" if name.endswith(("ssm_dt", "exp_probs_b")) else ".weight"


def _as_llama_cpp(architecture, config, name, numbers):
    """Names (of transformers) and numbers (as the file has them) of what one tensor of the model becomes."""
    if architecture == "llama":
        for side, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if side in name:
                numbers = interleaved(numbers, heads)
    norm_plus_one = architecture in ("gemma2", "gemma3") or (
        architecture.startswith("qwen35") and "linear_attn.norm" not in name
    )
    if (norm_plus_one or architecture == "nemotron") and name.endswith("norm.weight"):
        numbers = numbers + 1
    if architecture == "gpt2" and numbers.ndim == 2 and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc"):
        numbers = numbers.T
    if architecture == "bloom" and "query_key_value" in name:
        size = config.hidden_size // config.n_head
        apart = numbers.reshape(config.n_head, 3, size, *numbers.shape[1:])
        numbers = apart.swapaxes(0, 1).reshape(numbers.shape)
    if "conv" in name and numbers.ndim == 3:
        numbers = numbers[:, 0]
    if architecture.startswith("qwen35"):
        name, numbers = _linear_attention(config, name, numbers)
    if architecture == "bloom":
        name = name.removeprefix("transformer.")
    if architecture == "minimax-m2":
        name = name.replace(".mlp.", ".block_sparse_moe.").replace("correction_bias", "correction.bias")
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        sides = ("w1", "w3") if architecture == "minimax-m2" else ("gate_proj", "up_proj")
        halves = numpy.split(numbers, 2, axis=1)
        return [(f"{stem}{side}.weight", half) for side, half in zip(sides, halves, strict=True)]
    if name.endswith("experts.down_proj"):
        side = "w2" if architecture == "minimax-m2" else "down_proj"
        return [(f"{name.removesuffix('down_proj')}{side}.weight", numbers)]
    if name.endswith("shared_expert_gate.weight"):
        numbers = numbers[0]
    return [(name, numbers)]


def _linear_attention(config, name, numbers):
    """Value heads of all key heads in turn ("tiled"), where transformers has those of one key head together."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    size, first = config.linear_value_head_dim, 2 * config.linear_key_head_dim * keys

    def tiled(rows, width):
        return rows.reshape(keys, values // keys, width, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    part = name.rpartition("linear_attn.")[2]
    if part == "A_log":
        return name, tiled(-numpy.exp(numbers), 1)
    if part == "dt_bias":
        return name.replace("dt_bias", "dt_proj"), tiled(numbers, 1)
    if part in ("in_proj_a.weight", "in_proj_b.weight"):
        return name, tiled(numbers, 1)
    if part == "in_proj_z.weight":
        return name, tiled(numbers, size)
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        return name, numpy.concatenate([numbers[:first], tiled(numbers[first:], size)])
    if part == "out_proj.weight":
        return name, tiled(numbers.T, size).T
    return name, numbers


def rope_keys(rope):
    """Metadata on positions, as the converter derives them from `rope_parameters`."""
    keys = {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return keys


def llama3_tensor(rope, size):
    """`rope_freqs.weight` by the code of llama.cpp's converter, in float32."""
    base = rope["rope_theta"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    factors = []
    for frequency in 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wave = 2 * torch.pi / frequency
        if wave < trained / high:
            factors.append(1.0)
        elif wave > trained / low:
            factors.append(rope["factor"])
        else:
            smooth = (trained / wave - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    return numpy.array(factors, dtype=numpy.float32)
