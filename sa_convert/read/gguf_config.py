"""The config.json that a .gguf file's metadata describe.

Every key of the architecture is taken, or changes nothing, or is refused by its name. If a file is silent, what
llama.cpp takes then holds: files are made for its reading. The defaults of transformers are one model's values.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.families.refusals import NO_ENTRY, reason_for
from sa_convert.read.gguf_architecture import ARCHITECTURES, Architecture
from sa_convert.read.gguf_attention import attention_config, refuse_groups
from sa_convert.read.gguf_header import FOLDER, REMAKE, GgufHeader
from sa_convert.read.gguf_metadata import DEPTH, GROUPS, HIDDEN, Metadata

_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}
_NEEDED = ("expert_used_count", "attention.relative_buckets_count")
_NEEDED_NAMES = ("_eps", "_epsilon")
"""What no tensor tells, and for what neither llama.cpp nor transformers has a default that holds for all models."""

MORE_LAYERS = "nextn_predict_layers"
"""Key of the number of layers behind the last, which predict further tokens."""


def architecture_of(header: GgufHeader) -> Architecture:
    """The entry for the file's architecture. Raises UnsupportedModelError."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{header.file}: holds no language model but something beside one ({kind!r} under general.type); give the "
            "model's own file."
        )
    name = header.architecture
    if name not in ARCHITECTURES:
        start = f"{header.file}: models of the GGUF architecture '{name}' are not"
        reason = reason_for({"model_type": name.replace("-", "_")}, [])
        if reason != NO_ENTRY:
            raise UnsupportedModelError(f"{start} converted: {reason}.")
        raise UnsupportedModelError(f"{start} read, only those of {', '.join(sorted(ARCHITECTURES))}; {FOLDER}.")
    return ARCHITECTURES[name]


def config_of(header: GgufHeader) -> dict[str, Any]:
    """What the file tells of the model, by the names of config.json; what it does not tell is left to transformers.

    Raises CheckpointError for values that contradict each other, UnsupportedModelError for an architecture that is not
    read and for a key that says what a model of its type cannot compute in transformers.
    """
    entry = architecture_of(header)
    metadata = Metadata.of(header, entry)
    config: dict[str, Any] = {"model_type": entry.model_type, **entry.fixed}
    config |= _SPECIAL.get(header.architecture, _nothing)(metadata)
    config |= _plain(metadata, config) | _ends(metadata) | _biases(metadata)
    refuse_groups(metadata)
    if header.architecture != "t5":
        attention = attention_config(metadata)
        if "rope_parameters" in config:
            attention["rope_parameters"] |= config["rope_parameters"]
        config |= attention
    metadata.refuse_rest()
    return config


def _plain(metadata: Metadata, made: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are config values under another name, but for those that are made already.

    Raises CheckpointError for one that is missing, UnsupportedModelError for two that contradict each other.
    """
    config: dict[str, Any] = {}
    told_by: dict[str, str] = {}
    for key, name in metadata.entry.keys.items():
        if key not in metadata.own or name in made:
            continue
        value = metadata.take(key)
        if config.get(name, value) != value:
            other = metadata.name(told_by[name])
            raise metadata.beyond(key, f"is {value!r}, and {other} {config[name]!r}")
        config[name], told_by[name] = value, key
    for key, name in metadata.entry.keys.items():
        if name not in config and (key in _NEEDED or name.endswith(_NEEDED_NAMES)):
            raise metadata.wrong(key, "is missing")
    return config


def _ends(metadata: Metadata) -> dict[str, Any]:
    """Size of the vocabulary, whether the output has weights of its own, and the special tokens."""
    header = metadata.header
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.file}: has no matrix 'token_embd.weight', which every model needs; {REMAKE}.")
    if metadata.take("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        raise metadata.wrong("vocab_size", f"is not the {embedding.shape[0]} rows of 'token_embd.weight'")
    tied = metadata.entry.always_tied or "output.weight" not in header.tensors
    ids = {name: header.metadata.get(f"tokenizer.ggml.{key}") for key, name in _TOKENS.items()}
    if ids["unk_token_id"] is None:  # no config has this one unless it is told
        del ids["unk_token_id"]
    return {"vocab_size": embedding.shape[0], "tie_word_embeddings": tied, **ids}


def _biases(metadata: Metadata) -> dict[str, bool]:
    """For each config key of biases, whether the file has any of them."""
    held = {pattern_of(name) for name in metadata.header.tensors if name.endswith(".bias")}
    return {key: any(f"{module}.bias" in held for module in modules) for key, modules in metadata.entry.biases.items()}


def pattern_of(name: str) -> str:
    """A tensor's name with {} for the number of its layer."""
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))


def _qwen35(metadata: Metadata) -> dict[str, Any]:
    more = metadata.take(MORE_LAYERS, 0)
    if not isinstance(more, int):
        raise metadata.wrong(MORE_LAYERS, f"should be a whole number, but is {more!r}")
    depth = metadata.count(DEPTH, 1) - more
    interval = metadata.count("full_attention_interval", 4)
    heads, width = metadata.count("ssm.time_step_rank", 1), metadata.count("ssm.inner_size", 1)
    sections = metadata.own.get("rope.dimension_sections")
    metadata.taken.add("rope.dimension_sections")
    if not isinstance(sections, list):
        raise metadata.wrong("rope.dimension_sections", f"should be a list, but is {sections!r}")
    if depth < 1:
        raise metadata.wrong(MORE_LAYERS, f"is {more!r}, no less than the layers")
    if width % heads:
        raise metadata.wrong("ssm.inner_size", f"is {width}, no multiple of {heads} heads")
    return {
        "num_hidden_layers": depth,
        "layer_types": ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(depth)],
        "linear_value_head_dim": width // heads,
        "rope_parameters": {"mrope_section": [section for section in sections if section], "mrope_interleaved": True},
    }


def _lfm2(metadata: Metadata) -> dict[str, Any]:
    """Layers without KV groups are convolutions."""
    groups = metadata.own[GROUPS]
    depth = metadata.count(DEPTH, 1)
    groups = groups if isinstance(groups, list) else [groups] * depth
    metadata.taken.add(GROUPS)
    attending = {count for count in groups if count}
    if len(groups) != depth or len(attending) != 1:
        raise metadata.beyond(GROUPS, f"is {str(groups)[:60]}")
    return {
        "num_key_value_heads": attending.pop(),
        "layer_types": ["full_attention" if count else "conv" for count in groups],
    }


def _t5(metadata: Metadata) -> dict[str, Any]:
    gated = any(name.endswith(".ffn_gate.weight") for name in metadata.header.tensors)
    start = metadata.take("decoder_start_token_id", 0)
    return {"feed_forward_proj": "gated-gelu" if gated else "relu", "decoder_start_token_id": start}


def _stablelm(metadata: Metadata) -> dict[str, Any]:
    """Only layers that run their parts one after the other have a norm before the second."""
    metadata.taken.add("use_parallel_residual")
    return {"use_parallel_residual": not any(".ffn_norm." in name for name in metadata.header.tensors)}


def _bloom(metadata: Metadata) -> dict[str, Any]:
    if metadata.own.get("feed_forward_length") == 4 * metadata.count(HIDDEN, 1):
        metadata.taken.add("feed_forward_length")  # otherwise it is refused
    return {}


def _phi3(metadata: Metadata) -> dict[str, Any]:
    trained = metadata.own.get("rope.scaling.original_context_length")
    return {"original_max_position_embeddings": trained} if trained else {}


def _nothing(metadata: Metadata) -> dict[str, Any]:
    return {}


_SPECIAL: Mapping[str, Callable[[Metadata], dict[str, Any]]] = {
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "lfm2": _lfm2,
    "t5": _t5,
    "stablelm": _stablelm,
    "bloom": _bloom,
    "phi3": _phi3,
}
"""What takes more than other names, by architecture."""
