"""Damage to recipes: YAML with bombs, tabs, tags and odd keys, beside what `mutate_json` and `mutate_bytes` do."""

import random

from support.fuzz.mutate_bytes import mutate_bytes
from support.fuzz.mutate_json import RAW, mutate_json

_BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
LINES = (
    f"a0: &a0 [x]\n{_BOMB}", "a: &a [*a]", "<<: {refit: ridge}", "<<: *missing", "\tsharing: 1", "? [a, b]\n: 1",
    "? {a: 1}\n: 1",
    "1: 2", "null: 1", "true: x", "1.5: x", "~: ~", ": x", "? x", "- x", "---\nb: 1", "...\nx", "%YAML 9.9\n---",
    "%TAG ! tag:x,2000:\n---", "!!python/object/apply:os.system ['true']", "!!binary aGk=", "x: !!set {a, b}",
    "x: 2001-01-01", "x: 1:30", "x: 0o17", "x: .nan", "x: 1_000", "x: |\n text", "x: >-\n  a\n b", "x: 'a", 'x: "a',
    'x: "\\x"',
    'x: "\\ud800"', "x: [1", "x: {a", "\x00", "\x07", "\u2028", "\ufeff", "\x85", "refit: ridge\nrefit: none",
    "refit: true",
    "gate: {max_perplexity_increase: 1e999%}", "gate: {max_perplexity_increase: -5%}", "gate: 5%",
    "gate: {max_perplexity_increase: .inf}", "calibration: {sequences: 0, length: 1}",
    "calibration: {text: /etc/passwd}",
    "calibration: {sequences: 1000000000000000000000}", "[" * 2000, "{a: " * 2000, "- " * 3000, "? " * 3000,
    "x: " + "9" * 5000,
    f"description: {'x' * 1_000_000}", f"{'k' * 100_000}: 1", f"description: {'é' * 1000}", "# " + "x" * 100_000,
)  # fmt: skip
"""Lines to put into a recipe, most of which no recipe may hold."""

SPANS = (
    "0", "3-2", "1-3", "2-999999999999999999", "999999999999-9999999999999", "0-0", "3-3", "-1", "1-", "1--2", "١-٣",
    "3.0", "1e3",
    "0%-100%", "100%", "99.999999999999999999%-100%", "0.0000000001%-1%", "50%-101%", "9" * 5000, "1-" + "9" * 5000,
    "9" * 5000 + "%",
    "1%-" + "9" * 5000 + "%", "0x3", " 3 ", "3\n",
)  # fmt: skip
"""What a span may claim its layers are."""

MAPS = (
    "{3: [[2, 0]]}", "{3: [[2, 0], [2, 1], [2, 2], [2, 99999999999999999999]]}", "{99999999999999999999: [[2, 0]]}",
    "{-1: [[0, 0]]}",
    "{3: [[3, 0], null, null, null]}", "{0: [[0, 0], null, null, null]}", "{3: []}", "{3: null}", "{3: [[2]]}",
    "{3: [2]}",
    "{3: [[2, 0, 1]]}", "{3: [[2, true]]}", "{3: [['2', '0']]}", "{3: [[2.5, 0]]}", "{decoder.3: [[2, 0]]}",
    "{a.b.c.3: [[2, 0]]}",
    "{'': [[2, 0]]}", "{'decoder.': [[2, 0]]}", "{'٣': [[2, 0]]}",
    "{'03': [[2, 0], null, null, null], 3: [[2, 0], null, null, null]}",
    "{3: [null, null, null, null]}", "{}", "[]", "{2: [[1, 0], [1, 0], [1, 0], [1, 0]], 3: [[2, 0], null, null, null]}",
    "{'" + "9" * 5000 + "': [[2, 0]]}", "{²: [[1, 0]]}",
)  # fmt: skip


def mutate_recipe(text: str, chance: random.Random, as_json: str | None = None) -> bytes:
    """text: a recipe as YAML; as_json: the same as JSON, which YAML is."""
    way = chance.randrange(8)
    if way <= 1:
        return mutate_bytes(text.encode(), chance)
    if way <= 3 and as_json is not None:
        words = (*SPANS, "map", "spans", "search", "ridge")
        return mutate_json(as_json, chance, words).encode("utf-8", "surrogatepass")
    lines = text.splitlines()
    if way == 4:
        spans = f"  spans: [{{layers: {chance.choice(SPANS)!r}, source: {chance.choice((0, 1, 2, 3, -1, 10**30))}}}]"
        return f"sharing:\n{spans}\n".encode()
    if way == 5:
        return f"sharing: {{map: {chance.choice(MAPS)}}}\n".encode()
    at = chance.randrange(len(lines) + 1)
    indent = " " * chance.choice((0, 0, 0, 2, 4))
    odd = indent + chance.choice((*LINES, *(f"x: {raw.text}" for raw in RAW)))
    if way == 6 and at < len(lines):
        key = lines[at].partition(":")[0]
        odd = f"{key}: {chance.choice((*SPANS, *(raw.text for raw in RAW)))}"
        del lines[at]
    lines.insert(at, odd)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
