"""The tokenizer configuration of a converted model: AutoTokenizer is to choose the class that it chose for the base.

It chooses by the model type, too, and does not know ours.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.errors import UnsupportedModelError
from sa_convert.families.family import Family
from sa_convert.read.folder import read_json
from sa_convert.rewrite.carried import TOKENIZERS, is_carried

FILE = "tokenizer_config.json"

_PLAIN = "PreTrainedTokenizerFast"
"""tokenizer.json as it stands. Transformers 4 and 5 know this name, TokenizersBackend only 5."""

TEKKEN = "tekken.json"

_PLAIN_NAMES = (_PLAIN, "TokenizersBackend")


def tokenizer_config(checkpoint: Checkpoint, family: Family) -> dict[str, Any] | None:
    """The new content of tokenizer_config.json, or None if the base's, or its absence, serves as it is.

    Raises UnsupportedModelError if it names code in the model's folder: code of a base model is not copied, unless
    it is trusted (`tokenizer_code`).
    """
    names = {path.as_posix() for path in checkpoint.side_files}
    base: Mapping[str, Any] = read_json(checkpoint.folder / FILE) if FILE in names else {}
    if not checkpoint.trusted:
        _refuse_local_code(base)
    has_json = "tokenizer.json" in names
    tekken = TEKKEN in names and family.tokenizer.mistral_common
    if not (has_json or tekken or names & {"tokenizer.model", "vocab.json", "vocab.txt"}) or "auto_map" in base:
        return None
    declared = base.get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    chosen = _class_of(family, declared, has_json)
    code = _code_of(checkpoint, family, tekken)
    if (chosen == declared or chosen is None) and code is None:
        return None
    content = {**base, "tokenizer_class": chosen}
    if code is not None:
        reference = f"{TOKENIZERS.stem}.{code}"
        content["auto_map"] = {"AutoTokenizer": [reference, reference]}
    if chosen == _PLAIN:
        # Transformers 4 would return token_type_ids, which no model here takes; 5 returns these two.
        content.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return content


def tokenizer_code(checkpoint: Checkpoint) -> list[Path]:
    """The files, relative to the folder, that a trusted tokenizer's code consists of: its modules and what they import.

    Raises UnsupportedModelError for a file that is called like one of ours.
    """
    if not checkpoint.trusted or Path(FILE) not in checkpoint.side_files:
        return []
    from transformers.dynamic_module_utils import get_relative_import_files

    files = set[Path]()
    for reference in _references(read_json(checkpoint.folder / FILE)):
        module = checkpoint.folder / f"{reference.rpartition('.')[0]}.py"
        imported = [Path(file) for file in get_relative_import_files(module)]
        files |= {file.relative_to(checkpoint.folder) for file in (module, *imported)}
    taken = next((file for file in sorted(files) if is_carried(file.as_posix())), None)
    if taken is not None:
        raise UnsupportedModelError(f"The tokenizer's code is called {taken}, as a file of sa-convert is: rename it.")
    return sorted(files)


def _refuse_local_code(base: Mapping[str, Any]) -> None:
    for reference in _references(base):
        if "--" not in reference:  # org/name--module.Class stays where it is
            raise UnsupportedModelError(
                f"{FILE} names code of its own ('{reference}' under auto_map), which is not copied; save the tokenizer "
                "as tokenizer.json without auto_map, or remove that key."
            )


def _references(base: Mapping[str, Any]) -> list[str]:
    """The classes, such as "module.Class", that tokenizer_config.json names."""
    references = base.get("auto_map")
    found = references.get("AutoTokenizer") if isinstance(references, Mapping) else references
    return [str(reference) for reference in (found if isinstance(found, list) else [found]) if reference]


def _code_of(checkpoint: Checkpoint, family: Family, tekken: bool) -> str | None:
    """The class of ours that does for the converted model what AutoTokenizer does for its base by the model type."""
    written = str(checkpoint.config.get("transformers_version") or "0").partition(".")[0]
    corrected = family.tokenizer.corrected and written.isdecimal() and int(written) < 5
    if tekken:
        return "CorrectableTekkenTokenizer" if corrected else "TekkenTokenizer"
    return "CorrectableTokenizer" if corrected and Path("tokenizer.json") in checkpoint.side_files else None


def _class_of(family: Family, declared: Any, has_json: bool) -> str | None:
    registered = family.tokenizer.registered
    if family.tokenizer.wins and declared and str(declared).removesuffix("Fast") != registered:
        return registered
    if not has_json:
        return declared or family.tokenizer.vocabulary or registered
    if declared is None:
        return registered or _PLAIN
    # If it registers the plain class, transformers 5 does not trust another one that the file declares.
    return _PLAIN if declared in _PLAIN_NAMES or registered == _PLAIN else str(declared)


def as_json(content: Mapping[str, Any]) -> str:
    """As transformers writes configurations."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
