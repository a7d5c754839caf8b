"""The models and recipes that are damaged: small, valid, and of several families, since each reads other keys."""

import contextlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from support.fuzz.gguf_file import tiny_gguf
from support.make_checkpoint import tiny_llama

SHARDED, SINGLE, CONVERTED, VALIDATED = "sharded", "single", "converted", "validated"
FAMILIES = ("gemma3_text", "gpt2", "t5", "falcon", "qwen3_next", "llama4_text", "qwen2_5_vl", "bert", "modernbert")
"""Beside Llama: windows, fused projections, two stacks, layers without attention, layers without rotary, a text
configuration inside of another, encoders."""

SPANS = """\
description: A span as the paper has them
sharing:
  spans:
    - {layers: 3, source: 2}
refit: none
gate: {max_perplexity_increase: 10%}
"""
MAP = """\
sharing:
  map: {2: [[1, 0], [1, 1], null, [0, 3]], 3: [[1, 0], [1, 1], null, null]}
gate:
  max_perplexity_increase: 3%
"""
SEARCH = """\
description: Everything that a recipe can say of a search
sharing:
  search: {key_cache: 25%}
refit: ridge
calibration: {text: builtin, sequences: 32, length: 512}
gate: {max_perplexity_increase: 15%}
"""
BY_DEPTH = "sharing: {spans: [{layers: 50%-100%}]}\n"
"""Fits every family."""

CARD = """\
---
license: other
license_name: my-licence
license_link: LICENSE
language: [en, de]
---
# A card
"""
_SIDE_FILES = {
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6},
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "bos_token": "<s>"},
    "tokenizer.json": {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
}


@dataclass(frozen=True)
class Subjects:
    """folders: models by name. recipes: their texts by name."""

    root: Path

    def folder(self, name: str) -> Path:
        return self.root / name

    @property
    def recipe(self) -> Path:
        return self.root / "by-depth.yaml"

    @property
    def families(self) -> list[str]:
        return [name for name in FAMILIES if (self.root / name).exists()]


def make_subjects(root: Path, families: bool) -> Subjects:
    """Write all of them. families: those beside Llama too, which takes torch and transformers to make."""
    root.mkdir(parents=True)
    for name, shards in ((SINGLE, None), (SHARDED, 3)):
        folder = tiny_llama(root / name, shards)
        for file, content in _SIDE_FILES.items():
            (folder / file).write_text(json.dumps(content, indent=2))
        (folder / "README.md").write_text(CARD)
        (folder / "LICENSE").write_text("the licence")
    (root / "tiny.gguf").write_bytes(tiny_gguf().encode())
    subjects = Subjects(root)
    subjects.recipe.write_text(BY_DEPTH)
    _convert(subjects)
    if families:
        from support.tiny_models import save_tiny, save_tokenizer

        save_tiny("llama", root / VALIDATED)
        save_tokenizer(root / VALIDATED)
        for name in FAMILIES:
            save_tiny(name, root / name, max_shard_size="1GB")
    return subjects


def _convert(subjects: Subjects) -> None:
    """A model that shares already; what is damaged of it is what other commands read."""
    from sa_convert.commands.main import run

    arguments = ("convert", str(subjects.folder(SINGLE)), "--recipe", str(subjects.recipe))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert run((*arguments, "-o", str(subjects.folder(CONVERTED)), "--no-validate")) == 0


def copy_model(source: Path, target: Path) -> Path:
    """A copy by hard links; files in it are replaced, never written to."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def replace_file(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)
