"""Writes the folder of a timed conversation: bench.json, bench.md and bench.png."""

from collections.abc import Iterator
from pathlib import Path

from sa_convert.console.amounts import human_bytes
from sa_convert.domain.turn_times import TurnsBenchmark, TurnTime
from sa_convert.present.charts.chart_parts import save
from sa_convert.present.charts.chart_turns import turns_chart
from sa_convert.present.files.benchmark_folder import FIGURE, FILE, PAGE
from sa_convert.present.files.json_file import write_json

HEAD = (
    "turn", "history", "new", "computed again", "from the file", "saved", "of that loading", "file", "cache", "writing",
    "same tokens",
)  # fmt: skip


def write_turns(benchmark: TurnsBenchmark, folder: Path) -> None:
    """Write all files."""
    write_json(benchmark.to_json(), folder / FILE)
    lines = []
    for conversation in benchmark.models:
        lines += [f"# {conversation.id}", "", "| " + " | ".join(HEAD) + " |", "|---:" * len(HEAD) + "|"]
        lines += ["| " + " | ".join(row_of(number, turn)) + " |" for number, turn in enumerate(conversation.turns, 1)]
        lines.append("")
    lines += [f"![Time to the first token]({FIGURE})", "", *(f"- {note}" for note in turn_notes(benchmark))]
    (folder / PAGE).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    save(lambda: turns_chart(benchmark), folder / FIGURE)


def row_of(number: int, turn: TurnTime) -> tuple[str, ...]:
    """A turn as people read it, in the order of HEAD; "" if there is nothing."""
    kept, loading, saved = turn.kept, turn.loading, turn.saved
    return (
        str(number),
        f"{turn.history:,}",
        f"{turn.new:,}",
        _seconds(turn.recomputed.median),
        "" if kept is None else _seconds(kept.median),
        "" if saved is None else f"{saved:.1%}",
        "" if loading is None else _seconds(loading.median),
        human_bytes(turn.file_bytes),
        human_bytes(turn.cache_bytes),
        _seconds(turn.writing),
        "yes" if turn.same_tokens else "NO",
    )


def turn_notes(benchmark: TurnsBenchmark) -> Iterator[str]:
    """What to know about the numbers, a sentence a line."""
    made = benchmark.conditions
    yield f"Computed in {made.dtype} on {made.device} ({made.processor}), threads: {made.threads}"
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in benchmark.versions.items())
    runs = "1 run" if made.repeats == 1 else f"{made.repeats} runs"
    yield (
        f"Times to the first token, medians of {runs}: computed again, all that was said is read; from the file, the "
        "session is loaded (asked to be out of memory before) and the new message is read"
    )
    yield f"Messages are random tokens; answers are {made.new_tokens} greedy tokens, then random ones that are read"
    yield "Same tokens: the answer from the file is that of a conversation whose cache never left memory"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
