"""What a kernel of vLLM's, or its cache, cannot do is refused when a model is loaded, by one sentence."""

from .parts import windows_of
from .sharing import scattered

READ = ("auto", "float16", "bfloat16", "float32")
"""Kinds of pages that attention over sinks and a window reads."""


def refuse(described: dict, vllm_config) -> None:
    """Raises ValueError. described: `shared_attention` of a config.json."""
    if described.get("version") != 2:
        raise ValueError("sa-convert: config.json is not of version 2: convert the base model again.")
    if (layer := scattered(described)) is not None:
        raise ValueError(
            f"sa-convert: heads of one KV group of layer {layer} reuse heads with different keys, and vLLM's attention "
            "has one key for a KV group: convert again, with spans or with heads of one source in each KV group."
        )
    config, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    text = config.hf_config.get_text_config()
    windows = windows_of(described, text.num_key_value_heads)
    if not windows:
        return
    ranks = parallel.tensor_parallel_size
    one_manager = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    reasons = {
        f"tensor parallelism of {ranks} would divide a KV group": text.num_key_value_heads % ranks,
        f"pages of {cache.cache_dtype} are not read": cache.cache_dtype not in READ,
        "scores are capped (attn_logit_softcapping)": getattr(text, "attn_logit_softcapping", None),
        "KV transfer and offloading know no sinks": vllm_config.kv_transfer_config is not None,
        "drafts of speculative decoding were not tried": vllm_config.speculative_config is not None,
        "context parallelism divides no windows": parallel.decode_context_parallel_size > 1,
        "without the hybrid KV cache manager nothing is saved": one_manager,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"sa-convert: layer {min(windows)} has windows, and {reason}.")
