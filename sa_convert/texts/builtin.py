"""Text that every Python installation ships, so that calibration and validation need no network.

Manual topics (prose), modules of the standard library that hardly change between versions (code), tables, and passages
that repeat within a sequence (perplexity on prose alone hides what a plan does to copying). It is the same on all
machines that have the same version of Python, and nearly so across versions.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import cycle, islice, zip_longest
from pathlib import Path

from sa_convert.errors import DataError
from sa_convert.texts.document import Document, Part, cut

# Topics of Python's manual that have no paragraph in common (many others repeat them), in 3.10 and later.
TOPICS = (
    "assert", "assignment", "async", "attribute-access", "binary", "booleans", "calls", "comparisons", "customization",
    "debugger", "del", "dict", "exceptions", "exprlists", "floating", "for", "formatstrings", "function", "global",
    "id-classes", "import", "naming", "nonlocal", "numeric-types", "objects", "operator-summary", "power", "raise",
    "return", "sequence-types", "slicings", "specialattrs", "string-methods", "strings", "subscriptions", "try",
    "types", "typesmapping", "typesmethods", "typesmodules", "typesseq", "with",
)  # fmt: skip

CODE_MODULES = (
    "heapq", "textwrap", "shlex", "fractions", "statistics", "colorsys", "csv", "sched", "calendar", "reprlib",
    "fnmatch", "getopt", "copy", "difflib", "json.decoder", "json.encoder", "contextlib", "numbers", "pprint",
    "filecmp", "quopri", "linecache", "netrc", "configparser", "cmd", "bisect", "wave", "html.parser",
)  # fmt: skip

REPEATED_CHARACTERS = 600
REPETITIONS = 3


def builtin_documents() -> tuple[Document, ...]:
    """All documents, kinds in turn, so that any stretch of the text holds every kind. Raises DataError."""
    topics, modules, tables = list(_topics()), list(_modules()), list(_tables())
    documents: list[Document] = []
    for part in ("calibration", "validation"):
        offset = 0 if part == "calibration" else 1
        kinds = {
            "prose": _pieces(topics[offset::2]),
            "code": _pieces(modules[offset::2]),
            "table": _pieces(tables[offset::2]),
            "repetition": _repeated(topics[offset::2], modules[offset::2]),
        }
        documents.extend(_in_turn(kinds, part))
    return tuple(documents)


def _in_turn(kinds: dict[str, list[str]], part: Part) -> Iterator[Document]:
    for row in zip_longest(*kinds.values()):
        for kind, piece in zip(kinds, row, strict=True):
            if piece is not None:
                yield Document(piece, kind, part)


def _pieces(texts: list[str]) -> list[str]:
    """Pieces of all texts: the first of each, then the second of each, and so on."""
    rows = zip_longest(*(cut(text) for text in texts))
    return [piece.rstrip() + "\n\n" for row in rows for piece in row if piece is not None]


def _repeated(*sources: list[str]) -> list[str]:
    """From each text, a passage that `_pieces` starts elsewhere, said several times over."""
    passages = [
        text[middle : middle + REPEATED_CHARACTERS].strip() + "\n\n"
        for pair in zip(*(cycle(source) for source in sources), range(max(map(len, sources))), strict=False)
        for text in pair[:-1]
        if (middle := len(text) // 2) >= REPEATED_CHARACTERS
    ]
    return [passage * REPETITIONS for passage in dict.fromkeys(passages)]


def _topics() -> Iterator[str]:
    """Topics of Python's manual."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "The built-in text needs pydoc_data.topics, which this Python installation lacks: give a text file instead."
        ) from error
    # A topic that a version lacks leaves its place empty: the others must not change sides.
    yield from (topics.get(name, "") for name in TOPICS)


def _modules() -> Iterator[str]:
    """Source code of modules of the standard library."""
    for name in CODE_MODULES:
        spec = find_spec(name)
        path = Path(spec.origin) if spec is not None and spec.origin else Path(name)
        try:
            yield path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"The built-in text needs the source of the module {name}, which this Python installation lacks: "
                "give a text file instead."
            ) from error


def _tables() -> Iterator[str]:
    """Tables that depend on nothing but their formula or a standard."""
    import calendar
    import unicodedata
    from html.entities import codepoint2name

    english = calendar.TextCalendar()
    for year in (1999, 2000, 2024, 2025):
        weeks = (f"{month:4d} | " + " ".join(f"{day:2d}" for day in week)
                 for month in range(1, 13) for week in english.monthdayscalendar(year, month))  # fmt: skip
        yield f"Weeks of {year}\nmonth|  M  T  W  T  F  S  S\n" + "\n".join(weeks)
    entities = sorted(codepoint2name.items())
    for start in range(0, len(entities), 64):
        rows = (f"| U+{code:04X} | {chr(code)} | &{name}; |" for code, name in entities[start : start + 64])
        yield "| code | character | entity |\n|---|---|---|\n" + "\n".join(rows)
    for first in (0x0391, 0x0410, 0x2190, 0x2200):
        rows = (f"{code},{chr(code)},{unicodedata.name(chr(code), '')}" for code in range(first, first + 48))
        yield "code,character,name\n" + "\n".join(rows)
    for power in (2, 3, 5, 7):
        rows = (f"{power}^{n}\t{power**n}\t{power**n % 97}" for n in islice(range(64), 40))
        yield f"power\tvalue\tremainder by 97\n{chr(10).join(rows)}"
