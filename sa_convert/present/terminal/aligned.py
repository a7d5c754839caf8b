"""Tables of two columns."""

from collections.abc import Iterable


def aligned(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and texts, a line each, the texts below each other; no final newline."""
    lines = list(rows)
    width = max(len(label) for label, _ in lines) + 2
    return "\n".join(f"{label:<{width}}{text}".rstrip() for label, text in lines)
