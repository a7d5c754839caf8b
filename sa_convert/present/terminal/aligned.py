"""Tables of two columns, and cells of tables."""

from collections.abc import Iterable


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and texts, a line each, the texts below each other; no final newline."""
    lines = list(rows)
    width = max(len(label) for label, _ in lines) + 2
    return "\n".join(f"{label:<{width}}{text}".rstrip() for label, text in lines)


def with_error(text: str, error: float | None, form: str) -> str:
    """A number and its standard error, if it has one: "0.31 ± 0.02"."""
    return text if error is None else f"{text} ± {error:{form}}"
