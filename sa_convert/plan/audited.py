"""Whether the code in a converted model's folder is as this version of sa-convert, or an earlier one, writes it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.families.family import CLASS_PREFIX, PREFIX
from sa_convert.families.model_classes import model_classes_of
from sa_convert.families.table import FAMILIES
from sa_convert.read.folder import read_json
from sa_convert.rewrite.carried import TOKENIZERS, carried_files
from sa_convert.treatments.registry import runtime_files

CONFIGS = ("tokenizer_config.json", "generation_config.json")
"""Files besides config.json that may name code."""

PUBLISHED = Path(__file__).parent / "published_code.json"
"""SHA-256 of the code that earlier versions wrote: version -> file -> sum."""


@dataclass(frozen=True)
class AuditedFile:
    """One code file of a folder. sha256: its sum. written_by: "this version", the name of a listed earlier version, or
    None if no version writes such a file."""

    name: str
    sha256: str
    written_by: str | None


def expected_code(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Every code file that this version writes for a model with such a config.json, but for a tokenizer's.

    Empty if config.json is not one that this version writes: of another version, or an unknown base.
    """
    family = FAMILIES.get(str(config.get("model_type")).removeprefix(PREFIX))
    described = config.get("shared_attention")
    if family is None or not isinstance(described, Mapping) or described.get("version") != 2:
        return {}
    architecture = str((config.get("architectures") or [family.default_class])[0]).removeprefix(CLASS_PREFIX)
    layers = described.get("layers")
    plans = layers.values() if isinstance(layers, Mapping) else ()
    known, used = runtime_files(), {name for plan in plans for name in _treatments(plan)}
    files = {name: path for name, path in known.items() if name in used}
    return carried_files(family, files, model_classes_of(family, architecture).values())


def _treatments(plan: Any) -> Iterator[str]:
    """Names of the treatments of one layer; of something that is no plan, none."""
    if isinstance(plan, str):
        yield plan
    for group in plan.values() if isinstance(plan, Mapping) else ():
        yield from group if isinstance(group, Mapping) else ()


def audit_code(checkpoint: Checkpoint) -> list[AuditedFile]:
    """Every file of Python code in a converted folder, wherever it lies in it, in the order of their names."""
    sums = {
        path.relative_to(checkpoint.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.folder.rglob("*.py"))
    }
    expected = expected_code(checkpoint.config) | {TOKENIZERS.name: TOKENIZERS.read_bytes()}
    ours = {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}
    # A file that versions have in common is of the one that wrote most of the others.
    versions = [("this version", ours), *_published().items()]
    versions.sort(key=lambda version: -sum(version[1].get(name) == total for name, total in sums.items()))
    return [
        AuditedFile(name, total, next((label for label, known in versions if known.get(name) == total), None))
        for name, total in sums.items()
    ]


def missing_code(checkpoint: Checkpoint) -> list[str]:
    """Names of files without which the folder's model cannot be loaded."""
    needed = set(expected_code(checkpoint.config))
    if not needed:
        written = {item.written_by for item in audit_code(checkpoint)}
        versions = [set(sums) - {TOKENIZERS.name} for label, sums in _published().items() if label in written]
        needed = versions[-1] if versions else set()
    return sorted(name for name in needed if not (checkpoint.folder / name).is_file())


def foreign_code(checkpoint: Checkpoint) -> str | None:
    """What of the code that loading a converted folder runs is not byte for byte what sa-convert wrote, or None.

    transformers runs the files that `auto_map` of config.json and tokenizer_config.json name, those that they import,
    and `custom_generate/generate.py`. So no other code may be in the folder at all, and nothing else be named.
    """
    audited = audit_code(checkpoint)
    for item in audited:
        if item.written_by is None:
            return f"its code {item.name} is not what this version of sa-convert writes"
    names = {item.name for item in audited}
    for name, config in _configs(checkpoint):
        references = config.get("auto_map")
        values = references.values() if isinstance(references, dict) else [references] if references else []
        for value in [one for some in values for one in (some if isinstance(some, list) else [some])]:
            module, _, _ = str(value).partition(".")
            if f"{module}.py" not in names or module.startswith("tokenization") == (name == "config.json"):
                return f"{name} names code of its own ('{value}' under auto_map)"
    return None


def _configs(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    yield "config.json", checkpoint.config
    for name in CONFIGS:
        if (checkpoint.folder / name).exists():
            yield name, read_json(checkpoint.folder / name)


@cache
def _published() -> Mapping[str, Mapping[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return found
