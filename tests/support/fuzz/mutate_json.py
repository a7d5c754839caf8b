"""Damage to the structure of JSON text: what still parses, mostly, and says something else.

The text is kept as a tree of lists, in which an object is a list of pairs, so that a key can stand twice; numbers and
texts may be written in ways that `json.dumps` would never choose.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Pairs:
    """An object: keys and values in order, keys not necessarily unique."""

    items: list[list[Any]]


@dataclass(frozen=True)
class Raw:
    """Text that stands in the JSON as it is."""

    text: str


_HUGE = "9" * 400
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**12,
    10**30,
    0.0, 0.5, -0.5, 1.5, 1e308, 5e-324, "", "x", "0", "\x00", "\u202e", "\ud800", "\x1b[31m", "a\nb", "../x", "/",
    "é" * 300,
    "x" * 100_000,
)  # fmt: skip
RAW = tuple(
    map(
        Raw,
        ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "1E400", _HUGE, f"-{_HUGE}", "9" * 5000, '"\\ud800"',
         '"\\u0000"', "01", "+1", ".5", "1.", "0x10", "'x'", "nul", "", "[" * 50_000, '{"a":' * 50_000,
         "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, "/* */ 1", "1,"),
    )
)  # fmt: skip
"""Numbers out of range, wrong escapes, no JSON at all, nesting beyond what any parser takes."""


def mutate_json(text: str, chance: random.Random, words: tuple[Any, ...] = ()) -> str:
    """One to three changes to the structure. words: values that mean something in this file, to be put elsewhere."""
    root = [json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        owner, at = chance.choice(places)
        chance.choice(_WAYS)(owner, at, chance, words, root)
    return _dump(root[0])


def _places(owner: Any) -> Iterator[tuple[Any, int]]:
    """Every value in the tree as its list and number. In an object, the list is one pair and the number 1."""
    if isinstance(owner, Pairs):
        for pair in owner.items:
            yield pair, 1
            yield from _places(pair[1])
    elif isinstance(owner, list):
        for at, value in enumerate(owner):
            yield owner, at
            yield from _places(value)


def _odd(owner: list, at: int, chance: random.Random, words: tuple, root: list) -> None:
    owner[at] = chance.choice((*ODD_VALUES, *words, *words))


def _raw(owner: list, at: int, chance: random.Random, words: tuple, root: list) -> None:
    owner[at] = chance.choice(RAW)


def _wrap(owner: list, at: int, chance: random.Random, words: tuple, root: list) -> None:
    value = owner[at]
    owner[at] = chance.choice(([value], [], [value, value], Pairs([["x", value]]), Pairs([]), str(value)[:1000]))


def _nudge(owner: list, at: int, chance: random.Random, words: tuple, root: list) -> None:
    """A number becomes another of much the same size, or one that does not fit."""
    value = owner[at]
    if isinstance(value, int | float) and not isinstance(value, bool):
        owner[at] = chance.choice((value + 1, value - 1, value * 2, -value, value // 2, value + 0.5, value * 10**9))
    else:
        _swap(owner, at, chance, words, root)


def _swap(owner: list, at: int, chance: random.Random, words: tuple, root: list) -> None:
    """Two values change places, or one stands at both."""
    other, there = chance.choice(list(_places(root)))
    if isinstance(owner[at], Pairs | list) or isinstance(other[there], Pairs | list):
        owner[at] = None  # one may hold the other
    elif chance.random() < 0.5:
        owner[at] = other[there]
    else:
        owner[at], other[there] = other[there], owner[at]


def _keys(owner: list, at: int, chance: random.Random, words: tuple, root: list) -> None:
    """A key is renamed, missing, or stands twice."""
    objects = [pairs for pairs in _objects(root[0]) if pairs.items]
    if not objects:
        return _odd(owner, at, chance, words, root)
    pairs = chance.choice(objects)
    number = chance.randrange(len(pairs.items))
    key, value = pairs.items[number]
    way = chance.randrange(5)
    if way == 0:
        del pairs.items[number]
    elif way == 1:
        pairs.items.append([key, chance.choice((value, *ODD_VALUES[:12]))])
    elif way == 2:
        pairs.items[number][0] = chance.choice((key + "x", key[:-1], key.upper(), "", "__metadata__", "a/b", "\ud800"))
    elif way == 3:
        pairs.items.append([chance.choice(("x", "", "auto_map", "quantization_config", "\x1b[2J")), value])
    else:
        chance.shuffle(pairs.items)
    return None


def _objects(value: Any) -> Iterator[Pairs]:
    if isinstance(value, Pairs):
        yield value
        for _, inner in value.items:
            yield from _objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner)


_WAYS = (_odd, _odd, _odd, _raw, _wrap, _nudge, _nudge, _swap, _keys, _keys)


def _dump(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{_dump(inner)}" for key, inner in value.items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dump, value)) + "]"
    return json.dumps(value)
