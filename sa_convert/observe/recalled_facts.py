"""Facts in a long text that are asked for at its end: what is lost by windows that repetition does not reach.

    ... text ... Room 417 is kept by <four random tokens>. ... text ...
    Room 417 is kept by <four>. Room 250 is kept by <four>. ...

Random repetition tells how well a model finds tokens up to two thirds of a sequence away, among nothing but random
tokens. A single fact in a long text is found by fewer KV groups, from farther away.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sa_convert.observe.sequences import FACTS, Sample

WORDS = {
    "calibration": ("\nRoom {} is kept by", ".\n"),
    "held out": ("\nTicket {}:", ";\n"),
}
"""What comes before a code and after it. The validation's needles have other words."""

CODE = 4
"""Random tokens of a code."""

MOST = 16
"""In one sequence, at the most."""

FIRST, LAST = 0.02, 0.85
"""Where the first and the last fact stand, as parts of the text."""

ROOM = 0.3
"""Of a sequence, the most that the questions may take."""


def recalled(
    tokenizer: Any,
    text: torch.Tensor,
    vocabulary: torch.Tensor,
    generator: torch.Generator,
    words: tuple[str, str],
    *,
    start: int = 0,
) -> Sample | None:
    """A sequence as long as `text` (L,), with facts in it; None if none fits. The tokens of codes that are asked for
    are scored. start: tokens at the beginning that stay there."""
    length = len(text)
    before, after = (_tokens(tokenizer, part) for part in (words[0].format(100), words[1]))
    count = min(MOST, int(ROOM * length) // (len(before) + CODE + len(after)))
    if count == 0:
        return None
    names = torch.randperm(900, generator=generator)[:count] + 100
    facts = [_fact(tokenizer, int(name), vocabulary, generator, words) for name in names]
    asked = [facts[at] for at in torch.randperm(count, generator=generator).tolist()]
    questions = [token for opening, code, closing in asked for token in (*opening, *code, *closing)]
    filler = text[start:].tolist()
    room = length - start - len(questions) - sum(len(o) + len(c) + len(e) for o, c, e in facts)
    tokens, done = text[:start].tolist(), 0
    for number, (opening, code, closing) in enumerate(facts):
        place = int(room * (FIRST + (LAST - FIRST) * number / max(1, count - 1)))
        tokens += [*filler[done:place], *opening, *code, *closing]
        done = place
    tokens += filler[done:room]
    scored = torch.zeros(length, dtype=torch.bool)
    at = len(tokens)
    for opening, code, closing in asked:
        scored[at + len(opening) : at + len(opening) + len(code)] = True
        at += len(opening) + len(code) + len(closing)
    return Sample(torch.tensor(tokens + questions), FACTS, scored, kept=True)


def _fact(
    tokenizer: Any, name: int, vocabulary: torch.Tensor, generator: torch.Generator, words: tuple[str, str]
) -> tuple[list[int], list[int], list[int]]:
    code = vocabulary[torch.randint(len(vocabulary), (CODE,), generator=generator)].tolist()
    return _tokens(tokenizer, words[0].format(name)), code, _tokens(tokenizer, words[1])


def _tokens(tokenizer: Any, text: str) -> list[int]:
    found: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(found)
