"""How a timed conversation is shown in a terminal."""

from sa_convert.domain.turn_times import TurnsBenchmark
from sa_convert.present.files.turns_folder import HEAD, row_of, turn_notes


def render_turns(benchmark: TurnsBenchmark) -> str:
    """An aligned table for each model, then notes; no final newline."""
    lines = []
    for conversation in benchmark.models:
        rows = [HEAD, *(row_of(number, turn) for number, turn in enumerate(conversation.turns, 1))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
        lines.append(conversation.id)
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.append("")
    return "\n".join([*lines, *turn_notes(benchmark)])
