"""The tokenizer configuration of a converted model: AutoTokenizer is to choose the class that it chose for the base.

It chooses by the model type, too, and does not know ours.
"""

import json
from collections.abc import Mapping
from typing import Any

from sa_convert.data.checkpoint import Checkpoint
from sa_convert.errors import UnsupportedModelError
from sa_convert.export.shared_attention_families import Family
from sa_convert.read.folder import read_json

FILE = "tokenizer_config.json"

_PLAIN = "PreTrainedTokenizerFast"
"""tokenizer.json as it stands. Transformers 4 and 5 know this name, TokenizersBackend only 5."""

_PLAIN_NAMES = (_PLAIN, "TokenizersBackend")


def tokenizer_config(checkpoint: Checkpoint, family: Family) -> dict[str, Any] | None:
    """The new content of tokenizer_config.json, or None where the base's, or its absence, serves as it is.

    Raises UnsupportedModelError where it names code in the model's folder: code of a base model is not copied.
    """
    names = {path.as_posix() for path in checkpoint.side_files}
    base: Mapping[str, Any] = read_json(checkpoint.folder / FILE) if FILE in names else {}
    _refuse_local_code(base)
    has_json = "tokenizer.json" in names
    if not (has_json or names & {"tokenizer.model", "vocab.json", "vocab.txt"}) or "auto_map" in base:
        return None
    declared = base.get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    chosen = _class_of(family, declared, has_json)
    if chosen == declared or chosen is None:
        return None
    content = {**base, "tokenizer_class": chosen}
    if chosen == _PLAIN:
        # Transformers 4 would return token_type_ids, which no model here takes; 5 returns these two.
        content.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return content


def _refuse_local_code(base: Mapping[str, Any]) -> None:
    references = base.get("auto_map")
    found = references.get("AutoTokenizer") if isinstance(references, Mapping) else references
    for reference in found if isinstance(found, list) else [found]:
        if reference and "--" not in str(reference):  # org/name--module.Class stays where it is
            raise UnsupportedModelError(
                f"{FILE} names code of its own ('{reference}' under auto_map), which is not copied; save the tokenizer "
                "as tokenizer.json without auto_map, or remove that key."
            )


def _class_of(family: Family, declared: Any, has_json: bool) -> str | None:
    registered = family.tokenizer
    if family.tokenizer_wins and declared and str(declared).removesuffix("Fast") != registered:
        return registered
    if not has_json:
        return declared or family.vocabulary_tokenizer or registered
    if declared is None:
        return registered or _PLAIN
    # Where it registers the plain class, transformers 5 does not trust another one that the file declares.
    return _PLAIN if declared in _PLAIN_NAMES or registered == _PLAIN else str(declared)


def as_json(content: Mapping[str, Any]) -> str:
    """As transformers writes configurations."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
