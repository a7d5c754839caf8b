"""Folders of data files, one for each entry, which are read when they are first asked for.

A file is a JSON object whose keys are fields of a dataclass. Two keys are no fields. "like" names another entry, whose
file counts wherever this one says nothing; null takes back what stands there. "note" is for readers.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

T = TypeVar("T")


class Entries(Mapping[str, T]):
    """Every entry of a folder, by the names of the files, in the order of the alphabet.

    build: makes an entry of its name, of what its file says over those that it is like, and of what messages call it.
    own: keys that count in their own file only. Reading an entry raises ValueError if a file says what cannot be; the
    message names the file and the key.
    """

    def __init__(self, home: Path, build: Callable[[str, dict[str, Any], str], T], own: tuple[str, ...] = ()) -> None:
        self.home, self._build, self._own = home, build, own
        self._read: dict[str, T] = {}

    @cached_property
    def _names(self) -> dict[str, None]:
        return dict.fromkeys(sorted(file.stem for file in self.home.glob("*.json")))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> T:
        if name not in self._read:
            if name not in self._names:
                raise KeyError(name)
            said = {key: value for key, value in self._said(name).items() if key not in ("like", "note")}
            self._read[name] = self._build(name, said, f"{self.home / name}.json: ")
        return self._read[name]

    def _said(self, name: str, *followers: str) -> dict[str, Any]:
        """What the file of an entry says, over what it is like. followers: the entries that are like this one."""
        file = self.home / f"{name}.json"
        said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        like = said.get("like")
        if like is None:
            return said
        if like not in self._names or like in (name, *followers):
            raise ValueError(f"{file}: 'like' names {like!r}, which is no other entry.")
        others = self._said(like, name, *followers)
        over: dict[str, Any] = _over(said, {key: value for key, value in others.items() if key not in self._own})
        return over


def _over(said: Any, other: Any) -> Any:
    """One value over another; of two objects, key by key. null takes a key back."""
    if not isinstance(said, dict) or not isinstance(other, dict):
        return said
    both = {**other, **{key: _over(value, other.get(key)) for key, value in said.items()}}
    return {key: value for key, value in both.items() if value is not None}


def made(kind: type[T], said: Mapping[str, Any], where: str) -> T:
    """A dataclass of what a file says, lists as tuples. where: how messages call the place. Raises ValueError."""
    known: dict[str, Any] = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for key, value in said.items():
        if key not in known:
            raise ValueError(f"{where}{key} is unknown; there are {', '.join(known)}.")
        kinds = _kinds(known[key].type)
        if not isinstance(value, kinds):
            names = " or ".join(each.__name__ for each in kinds if each is not type(None))
            raise ValueError(f"{where}{key} is {value!r}, which is no {names}.")
    missing = [name for name, each in known.items() if each.default is each.default_factory is MISSING]
    if absent := [name for name in missing if name not in said]:
        raise ValueError(f"{where}{absent[0]} is missing.")
    return kind(**{key: _frozen(value) for key, value in said.items()})


def _kinds(wanted: Any) -> tuple[type, ...]:
    """The classes that a field may hold, lists for tuples: those of JSON."""
    several = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    return tuple(list if get_origin(kind) is tuple else get_origin(kind) or kind for kind in several)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
