"""The tokenizer configuration of a converted model: AutoTokenizer is to choose the class that it chose for the base.

It chooses by the model type, too, and does not know ours.
"""

import json
from collections.abc import Mapping
from typing import Any

from sa_convert.data.checkpoint import Checkpoint
from sa_convert.export.shared_attention_families import Family
from sa_convert.read.folder import read_json

FILE = "tokenizer_config.json"

_PLAIN = "PreTrainedTokenizerFast"
"""tokenizer.json as it stands. Transformers 4 and 5 know this name, TokenizersBackend only 5."""

_PLAIN_NAMES = (_PLAIN, "TokenizersBackend")

_TYPES = {
    _PLAIN: "mistral mixtral ministral ministral3 olmo2 olmo3 flex_olmo granite granitemoe granitemoeshared stablelm "
    "nemotron glm glm4 glm4_moe ernie4_5 ernie4_5_moe hyperclovax minimax_m2 phimoe",
    "Qwen2Tokenizer": "qwen2 qwen2_moe qwen3 qwen3_moe",
    "GemmaTokenizer": "gemma gemma2 gemma3_text",
    "CohereTokenizer": "cohere cohere2",
    "GPT2Tokenizer": "starcoder2 phi opt jais2",
    "GPTNeoXTokenizer": "olmo olmoe",
}

CLASSES = {model_type: name for name, types in _TYPES.items() for model_type in types.split()}
"""The tokenizer class that transformers 5 registers for a model type. Types that are not here have none. A test
compares it with transformers; asking there takes seconds, and torch."""

OVERRULING = ("qwen2",)
"""Types whose registered class transformers 5 takes whatever the file declares."""

_WITHOUT_JSON = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "ministral", "arcee", "phimoe"), "LlamaTokenizer"),
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared", "exaone4"), "GPT2Tokenizer"),
}
"""The class of a type above that reads the vocabulary where there is no tokenizer.json."""


def tokenizer_config(checkpoint: Checkpoint, family: Family) -> dict[str, Any] | None:
    """The new content of tokenizer_config.json, or None where the base's, or its absence, serves as it is."""
    names = {path.as_posix() for path in checkpoint.side_files}
    base: Mapping[str, Any] = read_json(checkpoint.folder / FILE) if FILE in names else {}
    has_json = "tokenizer.json" in names
    if not (has_json or names & {"tokenizer.model", "vocab.json", "vocab.txt"}) or "auto_map" in base:
        return None
    declared = base.get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    chosen = _class_of(family.model_type, declared, has_json)
    if chosen == declared or chosen is None:
        return None
    content = {**base, "tokenizer_class": chosen}
    if chosen == _PLAIN:
        # Transformers 4 would return token_type_ids, which no model here takes; 5 returns these two.
        content.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return content


def _class_of(model_type: str, declared: Any, has_json: bool) -> str | None:
    registered = CLASSES.get(model_type)
    if model_type in OVERRULING and declared and str(declared).removesuffix("Fast") != registered:
        return registered
    if not has_json:
        return declared or _WITHOUT_JSON.get(model_type, registered)
    if declared is None:
        return registered or _PLAIN
    # Where it registers the plain class, transformers 5 does not trust another one that the file declares.
    return _PLAIN if declared in _PLAIN_NAMES or registered == _PLAIN else str(declared)


def as_json(content: Mapping[str, Any]) -> str:
    """As transformers writes configurations."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
