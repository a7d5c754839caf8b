"""The families: each has a file in models/, with what differs from Llama. models/marian.json:

{"like": "bart", "config_class": "MarianConfig", "default_class": "MarianMTModel", ...}

Its keys are the fields of `Family`. Stacks are listed by name: {"encoder": {"layers": "model.encoder.layers", ...}}.
"""

from pathlib import Path
from typing import Any

from sa_convert.families.entries import Entries, made
from sa_convert.families.family import (
    PREFIX,
    Family,
    Modules,
    Processor,
    Stack,
    StockBlocks,
    StockWindows,
    Tokenizer,
    Windows,
)

HOME = Path(__file__).parent / "models"

_PARTS: dict[str, type] = {
    "modules": Modules,
    "windows": Windows,
    "stock_windows": StockWindows,
    "stock_blocks": StockBlocks,
    "tokenizer": Tokenizer,
    "processor": Processor,
}


def families_in(home: Path) -> Entries[Family]:
    """Every family of a folder, by model type."""
    return Entries(home, _family, own=("config_class", "default_class", "stock_windows", "stock_blocks"))


def _family(model_type: str, said: dict[str, Any], where: str) -> Family:
    for name in _PARTS.keys() & said:
        said[name] = _part(name, said[name], f"{where}{name}.")
    return made(Family, {"model_type": model_type, **said}, where)


def _part(name: str, said: Any, where: str) -> Any:
    if name == "modules" and "stacks" in said:
        stacks = [made(Stack, {"name": key, **of}, f"{where}stacks.{key}.") for key, of in said["stacks"].items()]
        said = {**said, "stacks": stacks}
    return made(_PARTS[name], said, where)


FAMILIES = families_in(HOME)
"""Every family that sa-convert knows."""


def family_named(model_type: object) -> Family | None:
    """The family of a model type, which may be that of a converted model; None if it is not known."""
    return FAMILIES.get(str(model_type).removeprefix(PREFIX))
