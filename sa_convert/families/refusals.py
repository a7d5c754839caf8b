"""Why models of types without an entry in shared_attention_families are refused."""

from collections.abc import Mapping
from typing import Any

NO_ENTRY = "there is no entry for its attention in shared_attention_families"
"""What is said of a type of which nothing else is known."""

# What tensors cannot tell, by model type.
_OF_TYPES: tuple[tuple[str, str], ...] = (
    (
        "gpt_neo mpt codegen ctrl xlm xlnet openai-gpt cpmant gpt_neox_japanese roformer git",
        "its attention is computed by code of its own, for which sa-convert has no module",
    ),
    (
        "mamba mamba2 falcon_mamba rwkv xlstm",
        "it has recurrent (state-space) layers only, and so no attention weights to share",
    ),
    (
        "nemotron_h zamba zamba2",
        "it has hybrid layers (attention and state-space) of a make that has no entry",
    ),
    (
        "falcon_h1",
        "transformers leaves the scaling vectors of its hybrid layers (mup_vector) unfilled in models with code of "
        "their own",
    ),
    ("afmoe beam laguna lfm3", "a projection of its own gates the attention's output, which has no entry"),
    ("hrm_text dory", "its layers run several times in one pass, and a projection gates the attention's output"),
    (
        "granite_swa granitemoe_swa",
        "its attention sinks scale the output of the attention rather than the attention weights",
    ),
    ("flint", "its checkpoints name tensors of the attention (softmax_offset) other than its modules do"),
    ("diffllama", "it has differential attention: the difference of two softmaxes"),
    ("doge", "its attention masks are made from the values of each layer"),
    ("gemma3n gemma3n_text", "it shares keys and values between layers already"),
    (
        "gemma4 gemma4_text gemma4_unified gemma4_unified_text gemma4_assistant gemma4_unified_assistant",
        "its layers may share keys and values already (num_kv_shared_layers) or use keys as values (attention_k_eq_v)",
    ),
    ("minimax_m3_vl minimax_m3_vl_text qwen4_exp qwen4_exp_text", "an indexer chooses what each layer attends to"),
    ("big_bird bigbird_pegasus", "it has block-sparse attention"),
    ("longformer led", "it has local attention computed in overlapping chunks, besides global attention"),
    ("reformer", "it has attention by hashing (LSH), whose layers see different tokens"),
    ("jetmoe", "its attention heads are a mixture of experts, chosen for each token"),
    ("mimo_v2_flash", "its layers differ in their number of KV groups, and values have another size than keys"),
    ("dbrx", "it clips queries, keys and values (clip_qkv) in one fused projection, which has no entry"),
    ("deepseek_v4", "it has latent attention, whose keys and values are one compressed projection"),
    ("zaya", "its queries and keys come from a convolution over the tokens"),
    (
        "inkling_text inkling2_text inkling2_loop_text",
        "its keys and values pass a convolution over the tokens, and positions are learned scores",
    ),
    ("cohere2_moe", "whether a layer with full attention rotates queries and keys depends on its feed-forward part"),
    (
        "internlm3 iquestcoder exaone",
        "transformers runs it by the classes of Llama with another configuration class, which has no entry",
    ),
    (
        "sarvam_moe",
        "transformers runs it by the classes of GLM-4-MoE with another configuration class, which has no entry",
    ),
    ("apertus1p5_text", "its classes are those of Apertus under other names, which have no entry"),
    (
        "modernbert-decoder",
        "its eager attention needs a mask in every step of decoding, which sa-convert does not make",
    ),
    ("moshi", "its projections are modules of their own (q_proj.linear), which have no entry"),
    ("bert-generation", "its model classes (BertGenerationDecoder) are not named by their heads"),
    ("prophetnet", "it has n-gram attention: several streams of queries over the same keys"),
    ("blt", "it is made of several transformers, which attend to bytes and to patches of them"),
    (
        "mllama mllama_text_model",
        "layers of its language model attend to images, and there is no entry for such layers",
    ),
    ("emu3_text_model", "AutoModelForCausalLM of transformers does not load its language model alone"),
    ("whisper", "it reads speech; sa-convert converts language models"),
)
_BY_TYPE = {model_type: reason for types, reason in _OF_TYPES for model_type in types.split()}

_LATENT = ("kv_a_proj", "kv_b_proj", "q_a_proj")
_RECURRENT = ("mamba", "A_log", "ssm")
_QUERIES = ("q_proj", "query", "q_lin", "c_attn", "qkv", "Wqkv")
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj_weight")
# Parts of a model that have fused tensors, too, but are no attention of a language model.
_ELSEWHERE = ("vision", "visual", "image", "audio", "linear_attn", "conv", "mamba")


def reason_for(config: Mapping[str, Any], tensors: list[str]) -> str:
    """Why a model without an entry is refused. tensors: the names of its tensors, as far as they are known."""
    if "auto_map" in config:
        return "its modeling code is not part of transformers, so what it computes is not known"
    known = _BY_TYPE.get(str(config.get("model_type")))
    return known or _latent(tensors) or _by_config(config) or _recurrent(tensors) or _fused(tensors) or NO_ENTRY


def _latent(tensors: list[str]) -> str | None:
    found = next((name for name in tensors if any(part in name for part in _LATENT)), None)
    return found and f"it has latent attention (MLA), whose keys are not one projection per head ('{found}')"


def _by_config(config: Mapping[str, Any]) -> str | None:
    if any(isinstance(config.get(key), Mapping) for key in ("text_config", "vision_config", "audio_config")):
        return "it is a multimodal model, and there is no entry for the language model inside of this one"
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder of a make that has no entry"
    return None


def _recurrent(tensors: list[str]) -> str | None:
    found = next((name for name in tensors if any(part in name for part in _RECURRENT)), None)
    if found is None:
        return None
    if any(_has(name, _QUERIES) for name in tensors):
        return f"it has hybrid layers (attention and state-space) of a make that has no entry ('{found}')"
    return f"it has recurrent (state-space) layers only, and so no attention weights to share ('{found}')"


def _fused(tensors: list[str]) -> str | None:
    language = (name for name in tensors if not any(part in name for part in _ELSEWHERE))
    found = next((name for name in language if _has(name, _FUSED)), None)
    return found and f"its queries, keys and values are fused in one tensor of a layout that is not known ('{found}')"


def _has(name: str, parts: tuple[str, ...]) -> bool:
    """Whether one of the modules in a tensor's name is called so: 'hc_attn_base' is no 'c_attn'."""
    return any(part in parts for part in name.split("."))
