"""How a benchmark is shown in a terminal."""

from sa_convert.domain.benchmark import Benchmark
from sa_convert.present.files.benchmark_folder import Row, notes_of, rows_of


def render_benchmark(benchmark: Benchmark) -> str:
    """An aligned table, a part for each context and batch, then notes; no final newline."""
    head = Row("", benchmark.model.id, benchmark.against.id, "ratio (quartiles)", "expected")
    parts = [
        (f"context {pairing.context}, batch {pairing.batch}", list(rows_of(pairing))) for pairing in benchmark.pairings
    ]
    every = [head, *(row for _, rows in parts for row in rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(head))]
    lines = [_line(head, widths)]
    for title, rows in parts:
        lines += [title, *(_line(row, widths) for row in rows)]
    return "\n".join([*lines, "", *notes_of(benchmark)])


def _line(row: Row, widths: list[int]) -> str:
    first, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return "   ".join([f"  {first}", *rest]).rstrip()
