"""A tiny random model of every causal language model type that transformers has.

Configurations are shrunk by the names of their keys, sub-configurations too; what names cannot tell is in EXTRA.
"""

import random
from typing import Any

from sa_convert.domain.geometry import ModelGeometry

DEPTH = 4
# Deep enough that each kind of layer occurs twice.
MIXED_DEPTH = 6
MAX_PARAMETERS = 5_000_000

# What AutoModelForCausalLM of this transformers cannot make of a configuration, at any size.
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "all its layers attend to keys of another model, which its own configuration class refuses",
    "gemma4_unified_assistant": "all its layers attend to keys of another model, which its own configuration class "
    "refuses",
    "musicgen": "its class takes the configuration of its decoder alone",
    "musicgen_melody": "its class takes the configuration of its decoder alone",
}

# Key of a configuration -> its value in a tiny model. Windows are shorter than the test sequences.
SIZES: dict[str, Any] = {
    key: value
    for value, keys in (
        (128, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
        (64, "hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width"),
        (
            64,
            "input_embedding_size output_embedding_size hidden_size_global backbone_hidden_size attention_hidden_size",
        ),
        (64, "projector_output_dim out_hidden_size"),
        (96, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dff ffn_hidden_size d_inner"),
        (96, "feed_forward_size dim_ff intermediate_size_mlp mlp_dim"),
        (32, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size"),
        (32, "shared_experts_intermediate_size dense_intermediate_size"),
        (DEPTH, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"),
        (DEPTH, "num_decoder_layers num_blocks conf_num_hidden_layers depth"),
        (8, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
        (8, "decoder_attention_heads swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
        (4, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups"),
        (16, "head_dim swa_head_dim kv_channels query_pre_attn_scalar"),
        (8, "dim_head d_kv d_head attention_head_size rotary_dim"),
        (512, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
        (8, "sliding_window window_size attention_window_size local_attention sliding_window_size"),
        (8, "attention_chunk_size"),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
        (1, "n_group num_expert_group topk_group"),
        (16, "qk_nope_head_dim v_head_dim index_head_dim"),
        (8, "qk_rope_head_dim"),
        (16, "kv_lora_rank q_lora_rank o_lora_rank laurel_rank adapter_rank hc_lowrank"),
        (4, "index_topk index_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads"),
        (16, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
        (8, "mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank mamba_n_heads mamba_num_heads"),
        (16, "mamba_d_head mamba_head_dim mamba_headdim hidden_size_per_layer_input"),
        (8, "mamba_chunk_size chunk_size conf_attention_chunk_size patch_size"),
        (32, "image_size crop_size max_source_positions"),
        (16, "num_position_embeddings codebook_size shape_vocab_size pronunciation_vocab_size router_hidden_size"),
        (16, "pronunciation_embed_dim shape_embed_dim ple_embed_dim"),
        (True, "is_decoder"),
        (0, "pad_token_id"),
        (1, "bos_token_id"),
        (2, "eos_token_id"),
    )
    for key in keys.split()
}
UNSET = {"num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4}
# Kinds of layers, one a layer: the same kinds in turn, in a tiny model.
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "no_rope_layers")

# Types whose default configuration is refused by its own class.
CONTRADICTORY = ("gemma4_assistant",)

DOTS3 = {
    "head_dim": 24,
    "index_head_dim": 16,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 8,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
EXTRA: dict[str, dict[str, Any]] = {
    # Parts that the defaults leave out.
    "cohere": {"use_qk_norm": True},
    "falcon": {"alibi": True},
    "glm4_moe": {"use_qk_norm": True},
    "llama": {"attention_bias": True},
    "olmo": {"clip_qkv": 0.3},
    "olmoe": {"clip_qkv": 0.3},
    "persimmon": {"qk_layernorm": True},
    "phi": {"qk_layernorm": True},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True},
    # Layers with attention, twice at least.
    "bamba": {"attn_layer_indices": [1, 3]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {"num_hidden_layers": 6},
    # What follows from other keys, or has a narrower range.
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{part: {"head_dim": 8} for part in ("decoder_config", "global_config", "patcher_config")},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4, "clip_qkv": 0.3}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "helium": {"head_dim": 8},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 32},
    "phi4_multimodal": {
        "audio_config": {"nemo_conv_channels": 16, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64},
    },
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128},
    "zamba2": {"attention_hidden_size": 128},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_types() -> list[str]:
    """Every model type with a causal language model in this transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _shrunk(config: Any) -> dict[str, Any]:
    """Arguments that make a tiny configuration of the class of `config`."""
    known = vars(config)
    sizes = {key: value for key, value in SIZES.items() if known.get(key) is not None}
    # Without these, some configurations have no rule for them.
    sizes.update({key: value for key, value in UNSET.items() if key in known and known[key] is None})
    if "qk_rope_head_dim" in sizes:
        # Latent attention: these two follow from the others.
        sizes.update({"head_dim": 8, "num_key_value_heads": 8})
    sizes = {key: value for key, value in sizes.items() if key in known}
    kinds = {key: list(dict.fromkeys(known[key])) for key in KINDS if known.get(key)}
    if any(len(of) > 1 for of in kinds.values()):
        sizes.update({key: MIXED_DEPTH for key, value in sizes.items() if value == DEPTH and "layer" in key})
    depth = next((sizes[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in sizes), DEPTH)
    for key, of in kinds.items():
        sizes[key] = [of[layer % len(of)] for layer in range(depth)]
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None:
            sizes[key] = {"model_type": part.model_type, **_shrunk(part)}
    return sizes


def _merged(into: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(into)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def smoke_config(model_type: str) -> Any:
    """A tiny configuration of this type."""
    from transformers import CONFIG_MAPPING

    extra = EXTRA.get(model_type, {})
    config_class = CONFIG_MAPPING[model_type]
    first = extra if model_type in CONTRADICTORY else {}
    return config_class(**_merged(_shrunk(config_class(**first)), extra))


def smoke_model(model_type: str) -> Any:
    """A random model in eager mode, every weight, bias and norm away from its initial value.

    Raises ValueError if it cannot be tiny, and whatever transformers raises if it cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = smoke_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"has {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def smoke_map(geometry: ModelGeometry, layers: list[int]) -> dict[int, list]:
    """A random map of the most demanding kind, among these layers: of those of a kind, the first owns its attention,
    the others borrow single heads, all heads, and whole KV groups in turn; if only layers can, every other one does.
    """
    chance = random.Random(0)
    classes: dict = {}
    for index in layers:
        layer = geometry.layers[index]
        assert layer.heads, f"layer {index} has attention, but the geometry says that it has none"
        kind = (layer.attention, layer.window, layer.rotary, layer.stack, layer.heads, layer.groups, layer.head_dim)
        classes.setdefault(kind, []).append(index)
    rows: dict[int, list] = {}
    for number, members in enumerate(classes.values()):
        layer = geometry.layers[members[0]]
        own = [(members[0], head) for head in range(layer.heads)]
        for place, index in enumerate(members[1:]):
            row: list = [None] * layer.heads
            if geometry.granularity == "layer":
                if place % 2 == 0:
                    row = [[members[0], (3 * head + 1) % layer.heads] for head in range(layer.heads)]
            else:
                mode = ("heads", "all", "groups")[(number + place) % 3]
                groups = [group for group in range(layer.groups) if mode != "groups" or group % 2 == 0]
                for head in (head for group in groups for head in layer.heads_of(group)):
                    if mode != "heads" or chance.random() < 0.6:
                        row[head] = list(chance.choice(own))
            own += [(index, head) for head in range(layer.heads) if row[head] is None]
            if any(row):
                rows[index] = row
    return rows
