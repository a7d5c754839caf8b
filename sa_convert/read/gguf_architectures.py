"""The architectures of GGUF that we read, by their names there."""

from collections.abc import Mapping
from dataclasses import replace

from sa_convert.read.gguf_architecture import Architecture

_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_EXPERT_KEYS = {"expert_used_count": "num_experts_per_tok"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _layers(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"blk.{{}}.{ours}": f"model.layers.{{}}.{theirs}" for ours, theirs in modules.items()}


_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.[].gate_proj",
    "ffn_up_exps": "mlp.experts.[].up_proj",
    "ffn_down_exps": "mlp.experts.[].down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GEMMA = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    **_ATTENTION,
    **_MLP,
}

_QKV_BIASES = ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v")
_ATTENTION_BIASES = (*_QKV_BIASES, "blk.{}.attn_output")
_MLP_BIASES = ("blk.{}.ffn_gate", "blk.{}.ffn_up", "blk.{}.ffn_down")
_TWO_LAYER_BIASES = ("blk.{}.ffn_up", "blk.{}.ffn_down")
_LAYER_NORMS = ("output_norm", "blk.{}.attn_norm", "blk.{}.ffn_norm")

_OLD_ROTARY = {
    "blk.{}.attn_rot_embd.weight": "frequencies that follow from rope.freq_base, which llama.cpp does not read either"
}

_LLAMA = Architecture(
    "llama",
    {**_KEYS, **_RMS},
    {**_ENDS, **_layers({**_NORMS, **_ATTENTION, **_MLP})},
    biases={"attention_bias": _ATTENTION_BIASES, "mlp_bias": _MLP_BIASES},
    neutral={"tensor_data_layout": ("Meta AI original pth",)},
    left_out=_OLD_ROTARY,
)
_QWEN2 = replace(_LLAMA, model_type="qwen2", neutral={}, biased=_QKV_BIASES, biases={}, left_out={}, head_size="extra")
_QWEN3 = Architecture(
    "qwen3",
    {**_KEYS, **_RMS},
    {**_ENDS, **_layers({**_NORMS, **_ATTENTION, **_QK_NORMS, **_MLP})},
    biases={"attention_bias": _ATTENTION_BIASES},
)
_GEMMA2 = Architecture(
    "gemma2",
    {**_KEYS, **_RMS, **_SOFTCAPS},
    {**_ENDS, **_layers(_GEMMA)},
    biases={"attention_bias": _ATTENTION_BIASES},
    window=True,
    layer_types=True,
    scale="query_pre_attn_scalar",
)
_QWEN35_KEYS = {
    **_KEYS,
    **_RMS,
    "full_attention_interval": "full_attention_interval",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
_QWEN35_LAYERS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **_ATTENTION,
    **_QK_NORMS,
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_QWEN35 = Architecture(
    "qwen3_5_text",
    _QWEN35_KEYS,
    {**_ENDS, **_layers({**_QWEN35_LAYERS, **_MLP})},
    whole=_layers({"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}),
    unsqueezed={"blk.{}.ssm_conv1d": 1},
    rotary="part",
    scalings=(),
)


def _t5_side(ours: str, theirs: str, modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.blk.{{}}.{a}": f"{theirs}.block.{{}}.layer.{b}" for a, b in modules.items()}


def _t5_attention(prefix: str, layer: str) -> dict[str, str]:
    return {f"{prefix}_{side}": f"{layer}.{side}" for side in "qkv"} | {f"{prefix}_o": f"{layer}.o"}


def _t5_mlp(number: int) -> dict[str, str]:
    return {
        "ffn_norm": f"{number}.layer_norm",
        "ffn_gate": f"{number}.DenseReluDense.wi_0",
        "ffn_up": f"{number}.DenseReluDense.wi_1",
        "ffn_down": f"{number}.DenseReluDense.wo",
    }


_T5_SELF = {
    "attn_norm": "0.layer_norm",
    **_t5_attention("attn", "0.SelfAttention"),
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
}
_T5_CROSS = {"cross_attn_norm": "1.layer_norm", **_t5_attention("cross_attn", "1.EncDecAttention")}

_GPT2_LAYERS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_LINEAR = ("blk.{}.attn_qkv", "blk.{}.attn_output", "blk.{}.ffn_up", "blk.{}.ffn_down")
_BLOOM_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON_LAYERS = {name: module for name, module in _BLOOM_LAYERS.items() if name != "ffn_norm"}
_OLD_NAMES = {"output_norm": "transformer.ln_f", "output": "lm_head"}


def _old_layers(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"blk.{{}}.{ours}": f"transformer.h.{{}}.{theirs}" for ours, theirs in modules.items()}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen2moe": Architecture(
        "qwen2_moe",
        {
            **_KEYS, **_RMS, **_EXPERT_KEYS, "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {**_ENDS, **_layers({**_NORMS, **_ATTENTION, **_EXPERTS, **_SHARED_EXPERT})},
        neutral={"expert_weights_norm": (False,), "expert_weights_scale": (0.0, 1.0), "expert_gating_func": (0, 1)},
        biased=_QKV_BIASES,
        head_size="extra",
        unsqueezed={"blk.{}.ffn_gate_inp_shexp": 0},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        {
            **_KEYS, **_RMS, **_EXPERT_KEYS, "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {**_ENDS, **_layers({**_NORMS, **_ATTENTION, **_QK_NORMS, **_EXPERTS})},
        fixed={"norm_topk_prob": True},  # llama.cpp's code does so for every file
        neutral={"expert_weights_norm": (True,), "expert_weights_scale": (0.0, 1.0), "expert_gating_func": (0, 1)},
        biases={"attention_bias": _ATTENTION_BIASES},
    ),
    "gemma2": _GEMMA2,
    "gemma3": replace(
        _GEMMA2, model_type="gemma3_text", tensors={**_ENDS, **_layers({**_GEMMA, **_QK_NORMS})}, scalings=("linear",)
    ),
    "phi3": Architecture(
        "phi3",
        {**_KEYS, **_RMS},
        {
            **_ENDS,
            **_layers({
                **_NORMS, "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
                "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
            }),
        },
        head_size="extra",
        rotary="part",
        scalings=("longrope",),
        window=True,
    ),
    "stablelm": Architecture(
        "stablelm",
        {**_KEYS, "attention.layer_norm_epsilon": "layer_norm_eps"},
        {**_ENDS, **_layers({**_NORMS, **_ATTENTION, **_MLP})},
        biased=_LAYER_NORMS,
        biases={"use_qkv_bias": _QKV_BIASES},
        head_size="none",
        rotary="part",
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {**_KEYS, "attention.layer_norm_epsilon": "norm_epsilon"},
        {
            **_ENDS,
            **_layers({**_NORMS, **_ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
        },
        biased=_LAYER_NORMS,
        biases={"use_bias": (*_ATTENTION_BIASES, *_TWO_LAYER_BIASES)},
        head_size="extra",
        window=True,
    ),
    "nemotron": Architecture(
        "nemotron",
        {**_KEYS, "attention.layer_norm_epsilon": "norm_eps", "attention.layer_norm_rms_epsilon": "norm_eps"},
        {
            **_ENDS,
            **_layers({**_NORMS, **_ATTENTION, "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}),
        },
        biased=_LAYER_NORMS,
        biases={"attention_bias": _ATTENTION_BIASES, "mlp_bias": _TWO_LAYER_BIASES},
        rotary="part",
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        {
            **_KEYS, **_RMS, **_EXPERT_KEYS, "expert_count": "num_local_experts",
            "expert_feed_forward_length": "intermediate_size",
        },
        {
            **_ENDS,
            **_layers({
                **_NORMS, **_ATTENTION, **_QK_NORMS, "ffn_gate_inp": "block_sparse_moe.gate",
                "ffn_gate_exps": "block_sparse_moe.experts.[].w1", "ffn_up_exps": "block_sparse_moe.experts.[].w3",
                "ffn_down_exps": "block_sparse_moe.experts.[].w2",
            }),
        },
        neutral={"expert_gating_func": (2,), "expert_weights_norm": (True,), "expert_weights_scale": (0.0, 1.0)},
        whole=_layers({"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"}),
        rotary="part",
    ),
    "lfm2": Architecture(
        "lfm2",
        {
            **_KEYS, "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache",
        },
        {
            "token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head",
            **_layers({
                "attn_norm": "operator_norm", "ffn_norm": "ffn_norm", **_ATTENTION,
                "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm",
                "attn_k_norm": "self_attn.k_layernorm", "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3",
                "ffn_down": "feed_forward.w2", "shortconv.in_proj": "conv.in_proj",
                "shortconv.out_proj": "conv.out_proj", "shortconv.conv": "conv.conv",
            }),
        },
        fixed={"block_auto_adjust_ff_dim": False},  # the file's width is the final one
        biases={"conv_bias": ("blk.{}.shortconv.in_proj", "blk.{}.shortconv.out_proj", "blk.{}.shortconv.conv")},
        unsqueezed={"blk.{}.shortconv.conv": 1},
        head_size="extra",
        scalings=(),
    ),
    "qwen35": _QWEN35,
    "qwen35moe": replace(
        _QWEN35,
        model_type="qwen3_5_moe_text",
        keys={
            **_QWEN35_KEYS, **_EXPERT_KEYS, "expert_count": "num_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        tensors={**_ENDS, **_layers({**_QWEN35_LAYERS, **_EXPERTS, **_SHARED_EXPERT})},
        unsqueezed={"blk.{}.ssm_conv1d": 1, "blk.{}.ffn_gate_inp_shexp": 0},
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
            "feed_forward_length": "n_inner", "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        {
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", **_OLD_NAMES,
            **_old_layers(_GPT2_LAYERS),
        },
        biased=(*_LAYER_NORMS, *_GPT2_LINEAR),
        transposed=_GPT2_LINEAR,
        head_size="none",
        rotary="none",
    ),
    "bloom": Architecture(
        "bloom",
        {
            "embedding_length": "hidden_size", "block_count": "n_layer", "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon", "context_length": "seq_length",
        },
        {
            "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
            **_OLD_NAMES, **_old_layers(_BLOOM_LAYERS),
        },
        biased=(*_LAYER_NORMS, "token_embd_norm", *_GPT2_LINEAR),
        head_size="none",
        rotary="none",
        always_tied=True,
    ),
    "falcon": Architecture(
        "falcon",
        {
            "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers", "feed_forward_length": "ffn_hidden_size",
            "attention.head_count": "num_attention_heads", "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        {"token_embd": "transformer.word_embeddings", **_OLD_NAMES, **_old_layers(_FALCON_LAYERS)},
        # Of several KV groups, llama.cpp reorders the fused projection, which transformers does not undo.
        neutral={"attention.head_count_kv": (1,), "tensor_data_layout": ("jploski",)},
        fixed={"multi_query": True, "alibi": False, "new_decoder_architecture": False},
        biased=("output_norm", "blk.{}.attn_norm"),
        biases={"bias": ("blk.{}.attn_qkv", "blk.{}.attn_output", *_TWO_LAYER_BIASES)},
        head_size="none",
        scalings=("linear", "yarn"),
        always_tied=True,
    ),
    "t5": Architecture(
        "t5",
        {
            "context_length": "n_positions", "embedding_length": "d_model", "block_count": "num_layers",
            "decoder_block_count": "num_decoder_layers", "feed_forward_length": "d_ff",
            "attention.head_count": "num_heads", "attention.head_count_kv": "num_heads", "attention.key_length": "d_kv",
            "attention.value_length": "d_kv", "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "attention.relative_buckets_count": "relative_attention_num_buckets",
            "decoder_start_token_id": "decoder_start_token_id",
        },
        {
            "token_embd": "shared", "output": "lm_head",
            "enc.output_norm": "encoder.final_layer_norm", "dec.output_norm": "decoder.final_layer_norm",
            **_t5_side("enc", "encoder", {**_T5_SELF, **_t5_mlp(1)}),
            **_t5_side("dec", "decoder", {**_T5_SELF, **_T5_CROSS, **_t5_mlp(2)}),
        },
        single=("enc.blk.{}.ffn_down", "dec.blk.{}.ffn_down"),
        left_out={"dec.blk.{}.cross_attn_rel_b.weight": "a leftover of old checkpoints, which no T5 computes with"},
        rotary="none",
    ),
}  # fmt: skip
