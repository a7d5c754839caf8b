"""The families, each read from its file in models/ when it is first asked for.

A file holds what differs from Llama, under the names of the fields of `Family`: models/bart.json

    {"config_class": "BartConfig", "default_class": "BartForConditionalGeneration", "modules": {"output": "out_proj"}}

Stacks are listed by name: "stacks": {"encoder": {"layers": "model.encoder.layers", ...}, ...}. "like" names a family
whose file counts wherever this one says nothing; null takes back what stands there. "note" is for readers.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from sa_convert.families.family import Family, Modules, Stack, Tokenizer, Windows

HOME = Path(__file__).parent / "models"

_NAMES = ("config_class", "default_class")
_PARTS = {"modules": Modules, "windows": Windows, "tokenizer": Tokenizer}
_UNREAD = ("like", "note")


class Families(Mapping[str, Family]):
    """Every family of a folder of data files, by model type, in the order of the alphabet.

    Reading one raises ValueError if its file, or one that it is like, has a key that no field has or a value of another
    kind; the message names the file and the key.
    """

    def __init__(self, home: Path = HOME) -> None:
        self.home = home
        self._read: dict[str, Family] = {}

    @cached_property
    def _types(self) -> dict[str, None]:
        return dict.fromkeys(sorted(file.stem for file in self.home.glob("*.json")))

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._types

    def __getitem__(self, model_type: str) -> Family:
        if model_type not in self._read:
            if model_type not in self._types:
                raise KeyError(model_type)
            self._read[model_type] = _family(model_type, self._entry(model_type), self._file(model_type))
        return self._read[model_type]

    def _file(self, model_type: str) -> Path:
        return self.home / f"{model_type}.json"

    def _entry(self, model_type: str, *followers: str) -> dict[str, Any]:
        """What the file of a family says, over what it is like. followers: the families that are like this one."""
        file = self._file(model_type)
        own = json.loads(file.read_text(encoding="utf-8"))
        if any(name not in own for name in _NAMES):
            raise ValueError(f"{file}: lacks {' or '.join(_NAMES)}, which are never those of another family.")
        like = own.get("like")
        if like is None:
            return dict(own)
        if like not in self._types or like in (model_type, *followers):
            raise ValueError(f"{file}: 'like' names {like!r}, which is no other family.")
        return _over(own, self._entry(like, model_type, *followers))


def _over(own: Any, other: Any) -> Any:
    """One value over another; of two objects, key by key."""
    if not isinstance(own, dict) or not isinstance(other, dict):
        return own
    return {**other, **{key: _over(value, other.get(key)) for key, value in own.items()}}


def _family(model_type: str, entry: dict[str, Any], file: Path) -> Family:
    parts = {}
    for name, part in _PARTS.items():
        values = dict(entry.get(name) or {})
        if name == "modules" and values.get("stacks"):
            where = f"{file}: modules.stacks."
            values["stacks"] = tuple(
                _made(Stack, {"name": key, **stack}, f"{where}{key}.") for key, stack in values["stacks"].items()
            )
        parts[name] = _made(part, values, f"{file}: {name}.")
    values = {key: value for key, value in entry.items() if key not in _UNREAD}
    if values.get("refuses"):
        values["refuses"] = tuple(values["refuses"])
    made: Family = _made(Family, values | parts | {"model_type": model_type}, f"{file}: ")
    return made


def _made(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass of these values; null stands for the default. where: how messages call what they came from."""
    known = {each.name: each for each in fields(kind)}
    given = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}{key} is unknown; there are {', '.join(known)}.")
        if value is None:
            continue
        wanted: Any = known[key].type
        if not str(wanted).startswith("tuple") and not isinstance(value, wanted):
            raise ValueError(f"{where}{key} is {value!r}, but should be {getattr(wanted, '__name__', wanted)}.")
        given[key] = value
    return kind(**given)


FAMILIES = Families()
"""Every family that sa-convert knows."""
