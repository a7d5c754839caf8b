"""The counts of a run as tables, for people and for docs/reliability.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- written by `make fuzz` -->", "<!-- end -->"

_KINDS = {
    "header": "header of a safetensors file",
    "index": "model.safetensors.index.json",
    "config": "config.json, of 10 families and of a converted model",
    "side file": "tokenizer and generation files, model card",
    "recipe": "recipe",
    "gguf": ".gguf file",
    "earlier output": "earlier output, with `--overwrite`",
}


def tables(result: dict[str, Any]) -> str:
    """Markdown."""
    return "\n".join(_lines(result))


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Put the tables between the two marks of the page. Raises ValueError where it has no marks."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no place for the tables")
    page.write_text(f"{head}{BEGIN}\n\n{tables(result)}\n\n{END}{tail}", encoding="utf-8")


def _lines(result: dict[str, Any]) -> Iterator[str]:
    cases, kills, disks, races = (result[part] for part in ("cases", "kills", "disks", "races"))
    faults = len(result["findings"])
    yield f"Seed {result['seed']}, {result['processes']} processes, {result['seconds']} s; faults found: {faults}."
    yield ""
    yield "| damaged input | cases | refused | accepted |"
    yield "|---|---|---|---|"
    for kind, (refused, accepted) in cases["kinds"].items():
        yield f"| {_KINDS[kind]} | {refused + accepted:,} | {refused:,} | {accepted:,} |"
    yield f"| together, of {cases['asked']:,} | {cases['done']:,} | {_sum(cases, 0):,} | {_sum(cases, 1):,} |"
    yield ""
    memory = cases["peak_memory_bytes"] / 1e6
    yield (
        f"The slowest case took {cases['slowest_seconds']:.2f} s. The largest process had {memory:,.0f} MB of memory, "
        "torch and transformers included."
    )
    yield ""
    signals = ", ".join(f"{count} {name}" for name, count in sorted(kills["signals"].items()))
    yield f"| killed runs: {signals} | {kills['done']} of {kills['asked']} |"
    yield "|---|---|"
    yield from (f"| {what} | {count} |" for what, count in sorted(kills["reached"].items(), key=lambda item: -item[1]))
    yield ""
    yield "| full disk, by what is limited | limits that were refused | limits that were enough |"
    yield "|---|---|---|"
    for name in {**disks["refused"], **disks["passed"]}:
        yield f"| {name} | {disks['refused'].get(name, 0)} | {disks['passed'].get(name, 0)} |"
    yield from (f"| {name} | not run: mounting is not allowed here | |" for name in disks["not_run"])
    yield ""
    yield f"| two runs into one destination | {races['done']} of {races['asked']} |"
    yield "|---|---|"
    yield from (f"| {what} | {count} |" for what, count in sorted(races["outcomes"].items()))


def _sum(cases: dict[str, Any], at: int) -> int:
    return sum(counts[at] for counts in cases["kinds"].values())
