"""The code that a converted model carries with it."""

from pathlib import Path

import sa_convert.runtime

HOME = Path(sa_convert.runtime.__file__).parent

TOKENIZERS = HOME / "tokenizer" / "tokenization_mistral.py"
"""Carried only by a model whose tokenizer_config.json names it."""


def model_code() -> list[Path]:
    """The modules of `sa_convert.runtime` that every converted model carries."""
    return [file for file in sorted(HOME.glob("*.py")) if file.name != "__init__.py"]


def write_code(folder: Path) -> None:
    """Copy the modules that every converted model carries into `folder`, byte for byte."""
    for file in model_code():
        (folder / file.name).write_bytes(file.read_bytes())
