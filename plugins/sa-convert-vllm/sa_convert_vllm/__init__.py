"""Serves checkpoints converted by sa-convert in vLLM, with the cache that they save.

vLLM loads `register` by the entry point `vllm.general_plugins` in each of its processes.
"""

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")
"""The families whose converted models were run; others go to vLLM's own Transformers backend."""


def register() -> None:
    from vllm import ModelRegistry

    for family in FAMILIES:
        ModelRegistry.register_model(f"SharedAttention{family}ForCausalLM", "sa_convert_vllm.model:TreatedForCausalLM")
