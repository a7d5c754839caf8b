"""Text that calibrates and validates: a built-in mix, the user's file, or a data set of the Hub.

Every text is split once, in the same way on every machine, into a part that calibrates and a part that validates, so
that no document is ever in both.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from sa_convert.errors import DataError
from sa_convert.texts.document import Document, Part, cut

MAX_CHARACTERS = 20_000_000
"""How much of a file or data set is read."""


@dataclass(frozen=True)
class Text:
    """Documents, and the name under which reports and model cards mention them (never a path of this machine)."""

    name: str
    documents: tuple[Document, ...]

    def split(self, part: Part, kinds: Iterable[str] | None = None) -> "Text":
        """The documents of one part; kinds: only these kinds, for texts that tell them apart."""
        chosen = tuple(document for document in self.documents if document.part == part)
        name = f"{self.name}, {part} part"
        if kinds is not None and any(document.kind != "text" for document in chosen):
            wanted = tuple(kinds)
            chosen = tuple(document for document in chosen if document.kind in wanted)
            name += f" ({' and '.join(wanted)})"
        return replace(self, name=name, documents=chosen)


def load_text(source: str) -> Text:
    """Text by its name: `builtin`, a .txt, .md or .jsonl file, or `hub:DATASET[:CONFIG[:SPLIT]]`.

    The first half of a file's or data set's text calibrates, the second half validates; of the built-in text, whole
    manual topics and modules go to one part or the other in turn. At most MAX_CHARACTERS are read. Raises DataError.
    """
    if source == "builtin":
        from sa_convert.texts.builtin import builtin_documents

        return Text("builtin", builtin_documents())
    if source.startswith("hub:"):
        return _halves(source, _hub_rows(source))
    path = Path(source)
    if path.suffix not in (".txt", ".md", ".jsonl"):
        raise DataError(
            f"{source}: text must be `builtin`, a .txt, .md or .jsonl file, or `hub:DATASET[:CONFIG[:SPLIT]]`."
        )
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else iter([_read(path)])
    return _halves(f"file {path.name}", rows)


def _halves(name: str, rows: Iterable[str]) -> Text:
    """Cut rows into pieces; the first half of the characters calibrates, the second validates."""
    pieces: list[str] = []
    total = 0
    for row in rows:
        for piece in cut(row[: MAX_CHARACTERS - total] + "\n\n"):
            pieces.append(piece)
            total += len(piece)
        if total >= MAX_CHARACTERS:
            break
    if len(pieces) == 1:  # a short text: still one half each
        pieces = list(cut(pieces[0], max(1, total // 3)))
    documents, seen = [], 0
    for piece in pieces:
        part: Part = "calibration" if 2 * (seen + len(piece) / 2) < total else "validation"
        documents.append(Document(piece, "text", part))
        seen += len(piece)
    return Text(name, tuple(documents))


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}): convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _jsonl_rows(path: Path) -> Iterator[str]:
    """The strings under "text"; lines that are blank are passed over."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(path, number, line)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text after line {number}: convert it to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from error


def _row(path: Path, number: int, line: str) -> str:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f'{path}, line {number}: expected an object with a string under "text".')
    return row["text"]


def _hub_rows(source: str) -> Iterator[str]:
    """Rows of a data set, streamed: no more is downloaded than is read."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{source}: reading data sets needs an extra: pip install 'sa-convert[datasets]'.") from error
    fields = source.removeprefix("hub:").split(":")
    if len(fields) > 3 or not all(fields):
        raise DataError(f"{source}: write hub:DATASET, hub:DATASET:CONFIG or hub:DATASET:CONFIG:SPLIT.")
    dataset, config, split = (*fields, *[""] * (3 - len(fields)))
    try:
        rows = iter(load_dataset(dataset, config or None, split=split or "train", streaming=True))
        first: dict[str, Any] = next(rows, {})
    except Exception as error:  # whatever the library and the network may raise: the user can only read it
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{source}: the data set cannot be read: {reason}") from error
    if not isinstance(first.get("text"), str):
        raise DataError(
            f"{source}: the data set has no column of strings named `text`; its columns: {', '.join(first)}."
        )
    yield first["text"]
    yield from (row["text"] for row in islice(rows, MAX_CHARACTERS))
