"""Pieces of text, and the part that each belongs to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Part = Literal["calibration", "validation"]

PIECE_CHARACTERS = 2_000
"""Documents are cut to about this length, so that a few sequences hold many kinds of text."""


@dataclass(frozen=True)
class Document:
    """A piece of text. kind: "prose", "code", "table" or "repetition" in the built-in text, else "text"."""

    text: str
    kind: str
    part: Part


def cut(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Consecutive pieces of about `size` characters that join to the text again; cut after a paragraph if there is one
    to cut at, else after a line, else anywhere."""
    start = 0
    while len(text) - start > 2 * size:
        stop = start + size
        for end in ("\n\n", "\n", " "):
            at = text.find(end, stop, start + 2 * size)
            if at >= 0:
                stop = at + len(end)
                break
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
