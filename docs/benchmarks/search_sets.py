"""What searches over several sets of treatments find for the same parts of the cache, from one measurement of costs.

    python docs/benchmarks/search_sets.py MODEL --sets window,share window,low_rank window,low_rank,share

Prints, for each set and part, what was saved, how many KV groups each treatment got, and by how many nats the loss
rises on held-out text and at most on a held-out repetition. It writes nothing.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import stdev
from tempfile import TemporaryDirectory

from sa_convert.domain.model import RunOptions
from sa_convert.domain.recipe import Calibration
from sa_convert.observe.session import Session, open_session
from sa_convert.read.work_on import describe, with_weights
from sa_convert.search.choose import Step
from sa_convert.search.fitting import learn
from sa_convert.search.whole_cache import Priced, cache_path, copying_rise, priced
from sa_convert.treatments.registry import searched


def lines_of(found: Priced, names: tuple[str, ...], parts: list[float], most_copying: float) -> Iterator[str]:
    """A row of the table for each part."""
    some = replace(found, ledgers={name: found.ledgers[name] for name in names})
    for part, step in zip(parts, cache_path(some, dict.fromkeys(parts, most_copying)), strict=False):
        yield row(found, names, part, step)


def row(found: Priced, names: tuple[str, ...], part: float, step: Step) -> str:
    base, measured = found.reference.base, step.measured
    assert measured is not None
    rises = [after - before for after, before in zip(measured.losses, base.losses, strict=True)]
    error = stdev(rises) / len(rises) ** 0.5 if len(rises) > 1 else 0.0
    groups = ", ".join(f"{name} {step.plan.group_count(name)}" for name in names)
    text = f"{measured.loss - base.loss:+.4f} ± {error:.4f}"
    copying = copying_rise(measured, base)
    return f"| {' + '.join(names)} | {part:.0%} | {step.removed:.1%} | {groups} | {text} | {copying:+.3f} |"


def search(session: Session, tokens: int, sets: list[tuple[str, ...]], parts: list[float], most: float) -> None:
    learn(session, None)
    found = priced(session, tokens)
    print("cost as measured to estimated:", {name: round(factor, 3) for name, factor in found.factors.items()})
    print("| treatments | asked | saved | KV groups | text, nats | copying at most, nats |\n|---|---|---|---|---|---|")
    for names in sets:
        for line in lines_of(found, names, parts, most):
            print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sets", nargs="+", default=["window,share", "window,low_rank", "window,low_rank,share"])
    parser.add_argument("--parts", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--at", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--copying", type=float, default=0.4, help="nats that copying may cost at the most")
    asked = parser.parse_args()
    sets = [tuple(names.split(",")) for names in asked.sets]
    treatments = searched(list(dict.fromkeys(name for names in sets for name in names)))
    with TemporaryDirectory() as workspace:
        from pathlib import Path

        run = RunOptions(dtype="float32")
        model = with_weights(describe(asked.model, run), asked.model, Path(workspace), run)
        calibration = Calibration(sequences=asked.sequences)
        with open_session(model, calibration, run, treatments=treatments, at=asked.at) as session:
            search(session, asked.at, sets, asked.parts, asked.copying)


if __name__ == "__main__":
    main()
