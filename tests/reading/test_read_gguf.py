"""Models in .gguf files: as transformers has them, with nothing of the file lost, and inspected by their header."""

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import transformers

from sa_convert.errors import CheckpointError, SaConvertError, UnsupportedModelError
from sa_convert.read.gguf_architecture import ARCHITECTURES
from sa_convert.read.open_model import open_model
from support.gguf_files import VOCABULARY, llama3_tensor, rope_keys, write_gguf

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": PLAIN,
}  # fmt: skip
RMS = "attention.layer_norm_rms_epsilon"
EPSILON = "attention.layer_norm_epsilon"


def decoder_keys(config, norm=RMS):
    """The metadata that files of most decoders have."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    epsilon = next(
        getattr(config, name)
        for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon")
        if hasattr(config, name)
    )
    return {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        norm: float(epsilon), "attention.key_length": size, "attention.value_length": size,
    }  # fmt: skip


def expert_keys(config):
    held = {
        "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }  # fmt: skip
    return {key: getattr(config, name) for key, name in held.items() if hasattr(config, name)}


def gemma_keys(config):
    return decoder_keys(config) | {
        "attention.sliding_window": config.sliding_window,
        **{
            key: value
            for key in ("attn_logit_softcapping", "final_logit_softcapping")
            if (value := getattr(config, key)) is not None
        },
    }


def gemma3_keys(config):
    full, local = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    return gemma_keys(config) | rope_keys(full) | {"rope.freq_base_swa": local["rope_theta"]}


def t5_keys(config):
    return {
        "context_length": 512, "embedding_length": config.d_model, "feed_forward_length": config.d_ff,
        "block_count": config.num_layers, "decoder_block_count": config.num_decoder_layers,
        "attention.head_count": config.num_heads, "attention.key_length": config.d_kv,
        "attention.value_length": config.d_kv, EPSILON: config.layer_norm_epsilon, RMS: config.layer_norm_epsilon,
        "attention.relative_buckets_count": config.relative_attention_num_buckets,
        "decoder_start_token_id": 0,
    }  # fmt: skip


def qwen35_keys(config):
    keys = decoder_keys(config)
    if not hasattr(config, "intermediate_size"):
        del keys["feed_forward_length"]
    return keys | expert_keys(config) | {
        "rope.freq_base": config.rope_parameters["rope_theta"], "rope.dimension_count": 4,
        "rope.dimension_sections": [1, 1, 0, 0], "full_attention_interval": 2,
        "ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }  # fmt: skip


QWEN35 = {
    **DECODER, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**PLAIN, "mrope_section": [1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

MODELS = {
    "llama": ("llama", {**DECODER, "head_dim": 16}, lambda c: decoder_keys(c) | rope_keys(c.rope_parameters)),
    "qwen2": ("qwen2", DECODER, lambda c: decoder_keys(c) | rope_keys(c.rope_parameters)),
    "qwen3": ("qwen3", {**DECODER, "head_dim": 16}, lambda c: decoder_keys(c) | rope_keys(c.rope_parameters)),
    "qwen2moe": (
        "qwen2_moe",
        {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 40},
        lambda c: decoder_keys(c) | expert_keys(c),
    ),
    "qwen3moe": (
        "qwen3_moe",
        {**DECODER, **EXPERTS, "head_dim": 16, "norm_topk_prob": True},
        lambda c: decoder_keys(c) | expert_keys(c),
    ),
    "gemma2": (
        "gemma2",
        {**DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "tie_word_embeddings": True},
        gemma_keys,
    ),
    "gemma3": (
        "gemma3_text",
        {
            **DECODER, "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        },
        gemma3_keys,
    ),
    "phi3": (
        "phi3",
        {
            **DECODER, "pad_token_id": 0, "sliding_window": 32, "original_max_position_embeddings": 128,
            "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5},
        },
        lambda c: decoder_keys(c) | {
            "rope.dimension_count": 4, "attention.sliding_window": 32, "rope.scaling.original_context_length": 128,
        },
    ),
    "stablelm": (
        "stablelm",
        {**DECODER, "use_qkv_bias": True, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        lambda c: decoder_keys(c, EPSILON) | {"rope.dimension_count": 4, "use_parallel_residual": True},
    ),
    "starcoder2": (
        "starcoder2",
        {**DECODER, "rope_parameters": {**PLAIN, "rope_theta": 123456.0}, "sliding_window": 32},
        lambda c: decoder_keys(c, EPSILON) | {"rope.freq_base": 123456.0, "attention.sliding_window": 32},
    ),
    "nemotron": (
        "nemotron",
        {**DECODER, "head_dim": 8, "norm_eps": 1e-4, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}},
        lambda c: decoder_keys(c, EPSILON) | {"rope.dimension_count": 2, "rope.scaling.type": "none"},
    ),
    "minimax-m2": (
        "minimax_m2",
        {
            **DECODER, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5},
        },
        lambda c: decoder_keys(c) | {
            "rope.dimension_count": 8, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64,
            "expert_gating_func": 2,
        },
    ),
    "lfm2": (
        "lfm2",
        {
            **DECODER, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"],
            "tie_word_embeddings": True,
        },
        lambda c: decoder_keys(c) | {
            "attention.head_count_kv": [0, 2], "shortconv.l_cache": c.conv_L_cache, "rope.freq_base": 10000.0,
        },
    ),
    "qwen35": ("qwen3_5_text", QWEN35, qwen35_keys),
    "qwen35moe": ("qwen3_5_moe_text", {**QWEN35, **EXPERTS, "shared_expert_intermediate_size": 40}, qwen35_keys),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 96,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        lambda c: {
            "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 96,
            "attention.head_count": 4, EPSILON: c.layer_norm_epsilon,
        },
    ),
    "bloom": (
        "bloom",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "n_layer": 2, "seq_length": 64, "bos_token_id": 1,
            "eos_token_id": 2,
        },
        lambda c: {
            "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 128,
            "attention.head_count": 4, "attention.head_count_kv": 4, EPSILON: c.layer_norm_epsilon,
        },
    ),
    "falcon": (
        "falcon",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
            "bias": False, "multi_query": True, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256,
        },
        lambda c: {
            "embedding_length": 32, "block_count": 2, "feed_forward_length": 128, "attention.head_count": 4,
            "attention.head_count_kv": 1, "context_length": 256, EPSILON: c.layer_norm_epsilon,
            "tensor_data_layout": "jploski",
        },
    ),
    "t5": (
        "t5",
        {
            "vocab_size": VOCABULARY, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "num_layers": 3,
            "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0, "n_positions": 512,
        },
        t5_keys,
    ),
}  # fmt: skip


def made(architecture, **changes):
    """A small model with random weights, and its metadata."""
    model_type, values, keys = MODELS[architecture]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**values, **changes})
    chosen = transformers.AutoModelForSeq2SeqLM if model_type == "t5" else transformers.AutoModelForCausalLM
    model = chosen.from_config(config)
    if model_type == "t5":  # transformers ties what it makes, and leaves apart what it loads
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            if parameter.dtype.is_floating_point:
                parameter.normal_(0, 0.5)
    return model, keys(config)


def loaded(folder):
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def described(checkpoint):
    return {name: (entry.dtype, entry.shape, entry.bytes) for name, entry in checkpoint.tensors.items()}


def logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 203)[None]).logits


def refused(file, message, error=UnsupportedModelError):
    """By the description, and so without tensors being read."""
    with pytest.raises(error) as caught:
        open_model(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def refusal(file):
    """What is said of a file, or None. Any other error is a fault."""
    try:
        open_model(str(file))
    except SaConvertError as error:
        return str(error)
    return None


def test_every_architecture_is_tried_and_documented():
    assert set(MODELS) == set(ARCHITECTURES)
    page = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text()
    assert all(f"`{architecture}`" in page for architecture in ARCHITECTURES)


@pytest.mark.parametrize("architecture", MODELS)
def test_written_as_transformers_has_it(tmp_path, architecture):
    """Tensors, bit for bit, and config of the model that the file was made from."""
    model, keys = made(architecture)
    model.save_pretrained(tmp_path / "right")
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys)
    seen, written = open_model(str(file)), open_model(str(file), tmp_path / "w")
    assert described(seen) == described(written)
    right, found = loaded(tmp_path / "right"), loaded(tmp_path / "w")
    assert right.keys() == found.keys()
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    right_config = json.loads((tmp_path / "right" / "config.json").read_text())
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    for key in (*{"transformers_version", "use_cache", "dtype"}, "architectures"):
        assert right_config.pop(key, None) == config.pop(key, None)
    assert config == right_config


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["minimax-m2", "t5", "bloom"])
def test_half_precision(tmp_path, architecture, dtype):
    """Of these, transformers keeps some weights in float32, or has buffers."""
    model, keys = made(architecture)
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys)
    assert described(open_model(str(file), None, dtype)) == described(open_model(str(file), tmp_path / "w", dtype))


DENSE = ("llama", "qwen2", "qwen3", "stablelm", "nemotron", "starcoder2")
"""Architectures whose config takes any way to scale positions."""


def scaled(architecture, rope):
    """A model with positions scaled so, and the metadata that tell it but for a tensor."""
    values = MODELS[architecture][1]
    part = {key: value for key, value in values["rope_parameters"].items() if key == "partial_rotary_factor"}
    model, keys = made(architecture, rope_parameters={**rope, **part})
    return model, {**keys, **rope_keys(rope)}


def same(tmp_path, model, file):
    """Asserts that the file's model, once written, computes what `model` does."""
    model.save_pretrained(tmp_path / "right")
    open_model(str(file), tmp_path / "w")
    right, found = logits(tmp_path / "right"), logits(tmp_path / "w")
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    return transformers.AutoConfig.from_pretrained(tmp_path / "w")


@pytest.mark.parametrize("rope", [LINEAR, YARN, {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}], ids=str)
@pytest.mark.parametrize("architecture", DENSE)
def test_scaled_positions_in_metadata(tmp_path, architecture, rope):
    model, keys = scaled(architecture, rope)
    keys |= {f"rope.scaling.yarn_{key}": value for key, value in rope.items() if key.startswith("beta")}
    same(tmp_path, model, write_gguf(tmp_path / "x.gguf", architecture, model, keys))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "stablelm"])
def test_strength_of_yarn(tmp_path, architecture):
    """llama.cpp multiplies its own by the file's."""
    rope = {**YARN, "attention_factor": 0.7 * (0.1 * numpy.log(4.0) + 1)}
    model, keys = scaled(architecture, rope)
    keys["rope.scaling.attn_factor"] = 0.7
    same(tmp_path, model, write_gguf(tmp_path / "x.gguf", architecture, model, keys))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "starcoder2"])
def test_factors_of_llama_3(tmp_path, architecture):
    rope = LLAMA3 | {"factor": 16.0, "high_freq_factor": 3.0}
    model, keys = scaled(architecture, rope)
    size = int(model.model.rotary_emb.inv_freq.numel() * 2)
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys, {"rope_freqs.weight": llama3_tensor(rope, size)})
    config = same(tmp_path, model, file)
    assert config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize(("factor", "size"), [(8.0, 128), (32.0, 64), (32.0, 128)])  # 3.1 and 3.3; 3.2 of 1B; 3.2 of 3B
def test_published_llama_3(tmp_path, factor, size):
    rope = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
    model, keys = made("llama", rope_parameters=rope, head_dim=size, max_position_embeddings=131072)
    file = write_gguf(tmp_path / "x.gguf", "llama", model, keys, {"rope_freqs.weight": llama3_tensor(rope, size)})
    assert open_model(str(file)).config["rope_parameters"] == rope


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_factors_of_no_known_kind(tmp_path, architecture):
    model, keys = made(architecture)
    size = int(model.model.rotary_emb.inv_freq.numel() * 2)

    def written(factors):
        return write_gguf(tmp_path / "x.gguf", architecture, model, keys, {"rope_freqs.weight": numpy.array(factors)})

    refused(written(numpy.linspace(1, 7, size // 2) ** 2), "'rope_freqs.weight'")
    refused(written(numpy.ones(size)), "'rope_freqs.weight'")
    refused(written(numpy.full(size // 2, numpy.nan)), "'rope_freqs.weight'")
    plain = open_model(str(written(numpy.ones(size // 2)))).config["rope_parameters"]
    assert plain["rope_type"] == "default"
    linear = open_model(str(written(numpy.full(size // 2, 4.0)))).config["rope_parameters"]
    assert (linear["rope_type"], linear["factor"]) == ("linear", 4.0)
    keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    refused(written(numpy.full(size // 2, 4.0)), "both by 'rope_freqs.weight' and by metadata (linear)")


def test_two_lists_of_factors(tmp_path):
    short, long = numpy.float32([1.0, 1.5]), numpy.float32([2.0, 5.0])
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short.tolist(), "long_factor": long.tolist(),
        "original_max_position_embeddings": 128, "partial_rotary_factor": 0.5, "attention_factor": 1.25,
    }  # fmt: skip
    model, keys = made("phi3", rope_parameters=rope)
    keys["rope.scaling.attn_factor"] = 1.25
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    same(tmp_path, model, write_gguf(tmp_path / "x.gguf", "phi3", model, keys, tensors))  # 200 tokens: the long ones
    file = write_gguf(tmp_path / "y.gguf", "phi3", model, keys, {"rope_factors_long.weight": long})
    refused(file, "without the other")
    tensors["rope_factors_long.weight"] = numpy.ones(3)
    file = write_gguf(tmp_path / "y.gguf", "phi3", model, keys, tensors)
    refused(file, "2 factors in 'rope_factors_short.weight' and 3 in 'rope_factors_long.weight' for 2 pairs")


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("llama", {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "'longrope'"),
        ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_log_multiplier": 0.1},
         "qwen3.rope.scaling.yarn_log_multiplier"),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5},
         "qwen2.rope.scaling.yarn_ext_factor"),
        ("phi3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "phi3.rope.scaling.type"),
        ("lfm2", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "lfm2.rope.scaling.type"),
        ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "gemma3.rope.scaling.type"),
        ("gpt2", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "gpt2.rope.scaling"),
        ("llama", {"rope.scaling.factor": "much"}, "llama.rope.scaling.factor"),
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ("qwen3", {"rope.dimension_sections": [1, 1, 1, 0]}, "qwen3.rope.dimension_sections"),
    ],
)  # fmt: skip
def test_positions_that_are_refused(tmp_path, architecture, keys, message):
    model, known = made(architecture)
    refused(write_gguf(tmp_path / "x.gguf", architecture, model, known | keys), message)


def biased(architecture, ends, **changes):
    """A model with the biases whose names end so, and their tensors; and one without for the file's own."""
    model, keys = made(architecture, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and not name.removesuffix(".bias").endswith(ends) and "norm" not in name:
                parameter.zero_()
    return model, keys


@pytest.mark.parametrize(
    ("architecture", "changes", "ends", "missing"),
    [
        ("llama", {"attention_bias": True}, ("q_proj", "k_proj", "v_proj", "o_proj"), ()),
        ("llama", {"attention_bias": True}, ("q_proj", "k_proj", "v_proj"), ("attn_output.bias",)),
        ("llama", {"mlp_bias": True}, ("gate_proj", "up_proj", "down_proj"), ()),
        ("qwen3", {"attention_bias": True}, ("q_proj", "k_proj", "v_proj"), ("attn_output.bias",)),
        ("gemma2", {"attention_bias": True}, ("q_proj", "k_proj", "v_proj", "o_proj"), ()),
        ("nemotron", {"attention_bias": True, "mlp_bias": True}, ("v_proj", "up_proj"),
         ("attn_q.bias", "attn_k.bias", "attn_output.bias", "ffn_down.bias")),
        ("starcoder2", {"use_bias": False}, (), ()),
        ("stablelm", {"use_qkv_bias": False}, (), ()),
    ],
)  # fmt: skip
def test_biases(tmp_path, architecture, changes, ends, missing):
    """Of a config key that brings some biases along which the file has not, those are zeros."""
    model, keys = biased(architecture, ends, **changes)
    without = [f"blk.{layer}.{name}" for layer in range(2) for name in missing]
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys, without=without)
    assert described(open_model(str(file))) == described(open_model(str(file), tmp_path / "seen"))
    same(tmp_path, model, file)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("qwen2", "attn_output"), ("phi3", "attn_qkv"), ("qwen3", "ffn_up"), ("gemma3", "ffn_down")],
)
def test_biases_that_are_refused(tmp_path, architecture, name):
    model, keys = made(architecture)
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys, {f"blk.1.{name}.bias": numpy.ones(32)})
    refused(file, f"'blk.1.{name}.bias'")


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_softcaps_scales_and_windows(tmp_path, architecture):
    depth = MODELS[architecture][1]["num_hidden_layers"]
    slides = [layer != 0 for layer in range(depth)]
    changes = {
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 25,
        "sliding_window": 7,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }  # fmt: skip
    model, keys = made(architecture, **changes)
    keys |= {"attention.scale": 0.2, "attention.sliding_window_pattern": slides}
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys)
    config = same(tmp_path, model, file)
    assert {key: getattr(config, key) for key in changes} == changes
    keys["attention.sliding_window_pattern"] = 3
    every = open_model(str(write_gguf(tmp_path / "y.gguf", architecture, model, keys))).config["layer_types"]
    assert every[:2] == ["sliding_attention"] * 2
    assert [index for index, kind in enumerate(every) if kind == "full_attention"] == list(range(2, depth, 3))


@pytest.mark.parametrize(("architecture", "depth"), [("gemma2", 46), ("gemma3", 62)])
def test_scale_of_the_largest_gemmas(tmp_path, architecture, depth):
    """llama.cpp knows the 27B models by their depth; no key of the file tells how they scale scores."""
    model, keys = made(architecture, num_hidden_layers=depth)
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys)
    assert open_model(str(file)).config["query_pre_attn_scalar"] == 32 // 4
    model, keys = made(architecture)
    file = write_gguf(tmp_path / "x.gguf", architecture, model, keys)
    assert open_model(str(file)).config["query_pre_attn_scalar"] == 16


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "nemotron", "stablelm", "gpt2", "bloom", "t5"])
@pytest.mark.parametrize(
    ("key", "lost", "neutral"),
    [
        ("attn_logit_softcapping", 50.0, 0.0),
        ("final_logit_softcapping", 30.0, 0.0),
        ("attention.scale", 0.1, None),
        ("attention.sliding_window", 32, 4096),
        ("logit_scale", 0.5, 1.0),
        ("residual_scale", 0.5, 1.0),
        ("embedding_scale", 12.0, 1.0),
        ("attention.clamp_kqv", 8.0, 0.0),
        ("attention.max_alibi_bias", 4.0, 0.0),
        ("attention.causal", False, True),
        ("nextn_predict_layers", 1, 0),
        ("of_a_later_release", 1, None),
    ],
)
def test_keys_that_are_refused(tmp_path, architecture, key, lost, neutral):
    model, keys = made(architecture)
    refused(write_gguf(tmp_path / "x.gguf", architecture, model, keys | {key: lost}), f"'{architecture}.{key}'")
    if neutral is not None and not (architecture in ("t5", "bloom", "gpt2") and key == "attention.sliding_window"):
        open_model(str(write_gguf(tmp_path / "y.gguf", architecture, model, keys | {key: neutral})))


@pytest.mark.parametrize("architecture", MODELS)
def test_tensors_and_keys_without_a_place_are_refused(tmp_path, architecture):
    model, keys = made(architecture)
    for name in ("blk.1.attn_new.weight", "new.weight", "rope_freqs.bias", "blk.0.attn_q.scale"):
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys, {name: numpy.ones(32)})
        refused(file, f"'{name}'")
    refused(write_gguf(tmp_path / "x.gguf", architecture, model, keys | {"new": 7}), f"'{architecture}.new'")


def test_what_changes_nothing_is_left_out_and_told(tmp_path, capsys):
    model, keys = made("llama")
    extra = {f"blk.{layer}.attn_rot_embd.weight": numpy.ones(8) for layer in range(2)}
    same(tmp_path, model, write_gguf(tmp_path / "x.gguf", "llama", model, keys, extra))
    assert "'blk.0.attn_rot_embd.weight' and 1 more is left out" in capsys.readouterr().err
    model, keys = made("bloom")
    written = open_model(
        str(write_gguf(tmp_path / "z.gguf", "bloom", model, keys, {"output.weight": numpy.ones((VOCABULARY, 32))})),
        tmp_path / "z",
    )
    assert "lm_head.weight" not in written.tensors
    assert "'output.weight' is left out: a copy of" in capsys.readouterr().err
    model, keys = made("qwen35")
    keys |= {"block_count": 3, "nextn_predict_layers": 1}
    extra = {"blk.2.nextn.eh_proj.weight": numpy.ones((32, 64)), "blk.2.attn_norm.weight": numpy.ones(32)}
    written = open_model(str(write_gguf(tmp_path / "y.gguf", "qwen35", model, keys, extra)), tmp_path / "y")
    assert written.config["num_hidden_layers"] == 2
    assert "'blk.2.nextn.eh_proj.weight' and 1 more is left out" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "starcoder2", "gemma2"])
def test_heads_of_a_size_of_their_own(tmp_path, architecture):
    part = {"rope_parameters": PLAIN} if architecture == "phi3" else {}
    model, keys = made(architecture, head_dim=12, query_pre_attn_scalar=12, **part)
    keys.pop("rope.dimension_count", None)
    assert same(tmp_path, model, write_gguf(tmp_path / "x.gguf", architecture, model, keys)).head_dim == 12


def test_heads_that_are_refused(tmp_path):
    model, keys = made("stablelm")
    sizes = {"attention.key_length": 12, "attention.value_length": 12}
    file = write_gguf(tmp_path / "x.gguf", "stablelm", model, keys | sizes)
    refused(file, "its heads have a size of their own ('stablelm.attention.key_length' is 12)")
    for architecture in ("llama", "qwen3", "gemma2"):
        model, keys = made(architecture)
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys | {"attention.value_length": 8})
        refused(file, f"'{architecture}.attention.value_length' is 8")
        sizes = {"attention.key_length": 20, "attention.value_length": 20, "rope.dimension_count": 20}
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys | sizes)
        refused(file, "but 'blk.0.attn_q.weight' has 64 rows", CheckpointError)
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys | {"attention.head_count_kv": [2, 1]})
        refused(file, f"'{architecture}.attention.head_count_kv' differs from layer to layer")
    model, keys = made("falcon", new_decoder_architecture=False)
    file = write_gguf(tmp_path / "x.gguf", "falcon", model, keys | {"attention.head_count_kv": 2})
    refused(file, "'falcon.attention.head_count_kv' is 2")


def test_counts_that_are_not_those_of_the_tensors(tmp_path):
    for architecture, key, wrong in (
        ("llama", "block_count", 1),
        ("qwen3", "block_count", 2**31 - 1),
        ("gemma3", "block_count", 2**31 - 1),
        ("t5", "decoder_block_count", 3),
        ("qwen3moe", "expert_count", 2**31 - 1),
        ("llama", "vocab_size", 7),
    ):
        model, keys = made(architecture)
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys | {key: wrong})
        refused(file, f"'{architecture}.{key}' is", CheckpointError)


def test_keys_that_are_missing(tmp_path):
    needed = {"llama": RMS, "gpt2": EPSILON, "qwen3moe": "expert_used_count", "qwen2": "block_count"}
    for architecture, key in needed.items():
        model, keys = made(architecture)
        del keys[key]
        refused(write_gguf(tmp_path / "x.gguf", architecture, model, keys), f"'{architecture}.{key}'", CheckpointError)


def test_architectures_that_are_refused(tmp_path):
    model, keys = made("llama")
    data = write_gguf(tmp_path / "x.gguf", "llama", model, keys).read_bytes()
    said = {"mamba": "recurrent", "gemma": "GGUF architecture 'gemma' are not read", "klaun": "klaun"}
    for name, message in said.items():
        length = len(name).to_bytes(8, "little") + name.encode()
        (tmp_path / "y.gguf").write_bytes(data.replace((5).to_bytes(8, "little") + b"llama", length, 1))
        refused(tmp_path / "y.gguf", message)


def test_without_tokenizer(tmp_path):
    for architecture in ("llama", "gpt2", "t5"):
        model, keys = made(architecture)
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys, tokenizer=False)
        assert open_model(str(file)).tensors
        with pytest.raises(CheckpointError, match=r"holds no tokenizer .*; use a file with one, or convert"):
            open_model(str(file), tmp_path / "w")
        assert not (tmp_path / "w").exists()


def test_with_a_tokenizer_that_transformers_does_not_know(tmp_path):
    model, keys = made("llama")
    file = write_gguf(tmp_path / "x.gguf", "llama", model, keys)
    file.write_bytes(file.read_bytes().replace(b"gpt2", b"gptx"))
    with pytest.raises(UnsupportedModelError, match=r"cannot read its tokenizer \(tokenizer.ggml.model is 'gptx'"):
        open_model(str(file), tmp_path / "w")


def test_without_one_of_its_tensors(tmp_path):
    for architecture in ("llama", "qwen2", "qwen3moe"):
        model, keys = made(architecture)
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys, without=("blk.1.attn_v.weight",))
        with pytest.raises(CheckpointError, match=r"has no tensor for 'model.layers.1.self_attn.v_proj.weight'"):
            open_model(str(file), tmp_path / "w")
        file = write_gguf(tmp_path / "x.gguf", architecture, model, keys, without=("token_embd.weight",))
        refused(file, "has no matrix 'token_embd.weight'", CheckpointError)


def test_damaged_headers(tmp_path):
    """Whatever the bytes, one sentence."""
    model, keys = made("llama")
    data = write_gguf(tmp_path / "x.gguf", "llama", model, keys).read_bytes()
    header = data.index(b"blk.1.ffn_down.weight") + 60
    random = numpy.random.default_rng(0)
    file, refusals = tmp_path / "y.gguf", 0
    for _ in range(500):
        wrong = bytearray(data)
        for place in random.integers(4, header, size=random.integers(1, 4)):
            wrong[place] = random.integers(256)
        file.write_bytes(wrong)
        said = refusal(file)
        refusals += said is not None
        assert said is None or (said.startswith(str(file)) and "\n" not in said)
    assert refusals > 100
    for length in range(4, len(data), 997):
        file.write_bytes(data[:length])
        refused(file, "cut", CheckpointError)


def test_inspection_reads_the_header_alone(tmp_path):
    """Neither torch nor transformers is loaded, and a vocabulary of 256k tokens costs no more than skipping it."""
    model, keys = made("llama", vocab_size=1 << 18, hidden_size=16, num_hidden_layers=1)
    file = write_gguf(tmp_path / "x.gguf", "llama", model, keys)
    code = (
        "import sys, time; from sa_convert.read.open_model import open_model; "
        "from sa_convert.jobs.inspecting import inspect_checkpoint; "
        f"found = inspect_checkpoint(open_model({str(file)!r})); "
        "print(found.parameters, time.process_time(), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parameters, seconds, torch_loaded, transformers_loaded = run.stdout.split()
    assert int(parameters) == sum(tensor.numel() for tensor in model.parameters())
    assert (torch_loaded, transformers_loaded) == ("False", "False")
    assert float(seconds) < 2
