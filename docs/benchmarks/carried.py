"""How much code a converted model carries: python docs/benchmarks/carried.py

Prints the table of docs/how-it-works.md. Lines of code are those that hold code: no blank line, comment or docstring.
"""

import ast
import io
import tokenize

from sa_convert.families.model_classes import model_classes_of
from sa_convert.families.table import FAMILIES
from sa_convert.rewrite.carried import carried_files
from sa_convert.treatments.registry import runtime_files

SHARED = ("share",)
EVERYTHING = ("window", "low_rank", "share", "merge", "linear", "drop")
SHOWN = (
    *((family, SHARED) for family in ("llama", "mixtral", "gpt2", "bert", "bart", "t5")),
    *(("llama", plan) for plan in (("window",), ("window", "share"), ("low_rank",), ("merge",), ("drop",), EVERYTHING)),
    ("gpt2", EVERYTHING),
)
"""Families, and the treatments of a plan."""

NOTHING = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: bytes) -> int:
    """Lines of Python that hold code."""
    text, told, lines = source.decode(), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            told.update(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOTHING:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - told)


def carried(model_type: str, treatments: tuple[str, ...] = SHARED) -> tuple[int, int, int]:
    """Files, lines, and lines of code that a folder of this family carries, if its plan has these treatments."""
    family, known = FAMILIES[model_type], runtime_files()
    classes = model_classes_of(family, family.default_class).values()
    files = carried_files(family, {name: known[name] for name in known if name in treatments}, classes)
    return len(files), sum(text.count(b"\n") for text in files.values()), sum(map(lines_of_code, files.values()))


def row(model_type: str, treatments: tuple[str, ...]) -> str:
    """A line of the table."""
    named = "all" if treatments == EVERYTHING else ", ".join(treatments)
    return f"| `{model_type}` | {named} | {' | '.join(f'{number:,}' for number in carried(model_type, treatments))} |"


if __name__ == "__main__":
    for shown in SHOWN:
        print(row(*shown))
