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
    return "\n".join(_lines(result)).strip()


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Put the tables between the two marks of the page. Raises ValueError if it has no marks."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no place for the tables")
    page.write_text(f"{head}{BEGIN}\n\n{tables(result)}\n\n{END}{tail}", encoding="utf-8")


def _lines(result: dict[str, Any]) -> Iterator[str]:
    """One table for each part that was run."""
    for part, table in (("damage", _damage), ("kills", _kills), ("disks", _disks), ("races", _races)):
        if part in result:
            yield from table(result[part])
            yield ""
            yield _run(result[part])
            yield ""


def _run(part: dict[str, Any]) -> str:
    faults = len(part["findings"])
    return f"Faults found: {faults}. Seed {part['seed']}, {part['processes']} processes, {part['seconds']} s."


def _damage(part: dict[str, Any]) -> Iterator[str]:
    yield "| damaged input | cases | refused | accepted |"
    yield "|---|---|---|---|"
    for kind, (refused, accepted) in part["kinds"].items():
        yield f"| {_KINDS[kind]} | {refused + accepted:,} | {refused:,} | {accepted:,} |"
    yield f"| together, of {part['asked']:,} | {part['done']:,} | {_sum(part, 0):,} | {_sum(part, 1):,} |"
    yield ""
    yield (
        f"The slowest case took {part['slowest_seconds']:.2f} s. The largest process had "
        f"{part['peak_memory_bytes'] / 1e6:,.0f} MB of memory, torch and transformers included."
    )


def _kills(part: dict[str, Any]) -> Iterator[str]:
    signals = ", ".join(f"{count} {name}" for name, count in sorted(part["signals"].items()))
    yield f"| killed runs: {signals} | {part['done']} of {part['asked']} |"
    yield "|---|---|"
    yield from (f"| {what} | {count} |" for what, count in sorted(part["reached"].items(), key=lambda item: -item[1]))


def _disks(part: dict[str, Any]) -> Iterator[str]:
    yield "| full disk, by what is limited | limits that were refused | limits that were enough |"
    yield "|---|---|---|"
    for name in {**part["refused"], **part["passed"]}:
        yield f"| {name} | {part['refused'].get(name, 0)} | {part['passed'].get(name, 0)} |"
    yield from (f"| {name} | not run: mounting is not allowed here | |" for name in part["not_run"])


def _races(part: dict[str, Any]) -> Iterator[str]:
    yield f"| two runs into one destination | {part['done']} of {part['asked']} |"
    yield "|---|---|"
    yield from (f"| {what} | {count} |" for what, count in sorted(part["outcomes"].items()))


def _sum(damage: dict[str, Any], at: int) -> int:
    return sum(counts[at] for counts in damage["kinds"].values())
