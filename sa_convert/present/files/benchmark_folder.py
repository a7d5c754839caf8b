"""Writes the folder of a benchmark: bench.json, bench.md and bench.png."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sa_convert.console.amounts import human_bytes, human_count
from sa_convert.domain.benchmark import Benchmark, Pairing, Spread
from sa_convert.present.charts.chart_bench import speed_chart
from sa_convert.present.charts.chart_parts import save
from sa_convert.present.files.json_file import write_json

FILE, PAGE, FIGURE = "bench.json", "bench.md", "bench.png"


class Row(NamedTuple):
    """One measure of both models, as people read it; "" if there is nothing."""

    measure: str
    model: str
    against: str
    ratio: str
    expected: str


def write_benchmark(benchmark: Benchmark, folder: Path) -> None:
    """Write all files."""
    write_json(benchmark.to_json(), folder / FILE)
    (folder / PAGE).write_text(_page(benchmark), encoding="utf-8", newline="\n")
    save(lambda: speed_chart(benchmark), folder / FIGURE)


def rows_of(pairing: Pairing) -> Iterator[Row]:
    """All measures at one context and batch."""
    mine, theirs = pairing.model, pairing.against
    ratio = _spread(pairing.prefill_ratio)
    yield Row("prefill", _seconds(mine.prefill), _seconds(theirs.prefill), ratio, _ratio(pairing.expected_prefill))
    yield Row("  tokens/s", _rate(pairing.prefill_rate(mine)), _rate(pairing.prefill_rate(theirs)), "", "")
    if mine.step and theirs.step and (step := pairing.step_ratio):
        ratio = _spread(step)
        yield Row("decode step", _seconds(mine.step), _seconds(theirs.step), ratio, _ratio(pairing.expected_step))
        yield Row("  tokens/s", _rate(pairing.step_rate(mine)), _rate(pairing.step_rate(theirs)), "", "")
    if pairing.cache_ratio is not None:
        yield _sizes("cache", mine.cache_bytes, theirs.cache_bytes, pairing.cache_ratio)
    yield _sizes("peak memory", mine.peak_memory, theirs.peak_memory, pairing.memory_ratio)


def _sizes(measure: str, mine: int | None, theirs: int | None, ratio: float) -> Row:
    return Row(measure, human_bytes(mine or 0), human_bytes(theirs or 0), _ratio(ratio), "")


def notes_of(benchmark: Benchmark) -> Iterator[str]:
    """What to know about the numbers, a sentence a line."""
    made, pairs = benchmark.conditions, benchmark.pairings[0]
    for model in (benchmark.model, benchmark.against):
        yield f"{model.id}: {human_count(model.parameters)} parameters, attention {model.attention}"
    yield f"Computed in {made.dtype} on {made.device} ({made.processor}), threads: {made.threads}"
    versions = ", ".join(f"{name} {version}" for name, version in benchmark.versions.items())
    yield f"Versions: {versions}"
    step = pairs.step_ratio
    blocks = f", {len(step.runs)} of blocks of up to {made.block} decode steps ({made.cache} cache)" if step else ""
    yield (
        f"Ratios of times: median and quartiles of runs of both models in turns: {made.repeats} of prefills{blocks}; "
        f"{made.warmup} warm-up"
    )
    yield "Expected: ratio of FLOPs at prefill, of bytes read at a decode step, from weights, sharing map and cache"
    if made.mixture_of_experts:
        yield "All experts count as used by every token, so the expected ratios are nearer to 1 than they should be"
    yield f"Peak memory: {made.peak_memory}"
    if made.task == "masked-token":
        yield "The models cache nothing, so there is no decoding: prefill is one pass over the text"
    if made.task == "teacher-forced":
        yield "Encoder-decoders: the encoder reads the context, and the decoder has as long a text, before decoding"
    if benchmark.skipped:
        skipped = ", ".join(map(str, benchmark.skipped))
        yield f"Contexts left out, since the models have no positions for them: {skipped}"


def _page(benchmark: Benchmark) -> str:
    mine, theirs = benchmark.model.id, benchmark.against.id
    lines = [
        f"# {mine} against {theirs}",
        "",
        f"| context | batch | | {mine} | {theirs} | ratio | expected |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for pairing in benchmark.pairings:
        for number, row in enumerate(rows_of(pairing)):
            place = (str(pairing.context), str(pairing.batch)) if number == 0 else ("", "")
            lines.append("| " + " | ".join([*place, row.measure.strip(), *row[1:]]) + " |")
    lines += ["", f"![Ratios of {mine} to {theirs}]({FIGURE})", "", *(f"- {note}" for note in notes_of(benchmark))]
    return "\n".join(lines) + "\n"


def _seconds(spread: Spread) -> str:
    seconds = spread.median
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1000:.4g} ms" if seconds < 1 else f"{seconds:.3f} s"


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(ratio: Spread) -> str:
    first, third = ratio.quartiles
    return f"{ratio.median:.3f} ({first:.3f}-{third:.3f})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
