"""Compares sharing with its alternatives at equal bytes of KV cache saved.

    python docs/benchmarks/quality.py MODEL [--name NAME] [--rows paper,ours,drop,linear] [--budgets 10,25,40]
                                      [--keep FOLDER] [--cache FOLDER] [--fresh]
    python docs/benchmarks/quality.py --page [--merge FILE ...]

MODEL is a folder or a .gguf file. A budget is a percentage of the key cache (a fraction such as 40/3 will do); half of
that is its part of the whole cache. Each row is measured by itself and merged into quality.json beside this file, so a
run may be taken up again and rows measured again one by one (`--fresh` forgets them all). docs/quality.md and its
figure are written from that file after every run, or by `--page` alone, which takes rows over from other files, too.

`ours` and `paper` are conversions by the command line, measured by loading the folder that it wrote. `drop` and
`linear` are not part of the product: they are hooks on the base model (quality_baselines.py).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from quality_counts import fingerprint  # noqa: E402  # noqa: E402
from quality_page import write_page  # noqa: E402
from quality_rows import Benchmark, Row  # noqa: E402
from quality_tables import METHODS  # noqa: E402
from quality_text import LENGTH, NEWS_SKIPPED, SEQUENCES, SHA256, WHEEL, default_cache  # noqa: E402

from sa_convert.models.load import load_base  # noqa: E402
from sa_convert.present.files.report_file import installed_versions  # noqa: E402
from sa_convert.read.open_model import open_model  # noqa: E402

RESULTS = HERE / "quality.json"


def settings() -> Row:
    return {
        "text": {"wheel": WHEEL, "sha256": SHA256, "news items skipped": NEWS_SKIPPED},
        "sequences": SEQUENCES,
        "length": LENGTH,
        "dtype": "float32",
    }


def merge(results: Row, row: Row, file: Path) -> None:
    """Put a row in the place of the one that measured the same before, and write the file."""

    def key(row: Row) -> tuple[str, float]:
        return row["method"], row.get("layers") or row["budget"]

    done = json.loads(file.read_text())["rows"]  # another run may have added to it
    rows = [*(other for other in done if key(other) != key(row)), row]
    results["rows"] = sorted(rows, key=lambda row: (list(METHODS).index(row["method"]), -row["cache_bytes_per_token"]))
    save(results, file)


def take_over(other: Row, file: Path) -> None:
    """Put the rows of another file among ours."""
    if not RESULTS.exists():
        save({**other, "rows": []}, RESULTS)
    results = json.loads(RESULTS.read_text())
    if other["base"]["sha256"] != results["base"]["sha256"] or other["settings"] != results["settings"]:
        raise SystemExit(f"{file} is of another model or other settings than {RESULTS}.")
    for row in other["rows"]:
        merge(results, row, RESULTS)


def save(results: Row, file: Path) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    partial = file.with_suffix(".partial")
    partial.write_text(one_line_lists(text) + "\n")
    partial.rename(file)


def one_line_lists(text: str) -> str:
    return re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)


def provenance() -> Row:
    """What made a row, and on how many threads, on which the seconds depend."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "versions": {**installed_versions(), "python": sys.version.split()[0]},
        "commit": commit.stdout.strip(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--name", help="what the results call the model; default: the name of the folder or file")
    parser.add_argument("--rows", default="paper,ours,drop,linear")
    parser.add_argument("--budgets", default="10,25,40", help="percentages of the key cache")
    parser.add_argument("--keep", type=Path, help="folder for the conversions; default: a temporary one")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the wheel with the texts")
    parser.add_argument("--fresh", action="store_true", help="forget all earlier results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of another model: a file of its own, no page")
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="with --page: results of the same model")
    options = parser.parse_args()
    for file in options.merge:
        take_over(json.loads(file.read_text()), file)
    if not options.page:
        if options.model is None:
            parser.error("MODEL is missing")
        wanted = options.rows.split(",")
        if unknown := set(wanted) - {"paper", "ours", "drop", "linear"}:
            parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
        budgets = [Fraction(part) / 100 for part in options.budgets.split(",")]
        with tempfile.TemporaryDirectory(prefix="sa-convert-quality-") as temporary:
            run(options, wanted, budgets, Path(temporary))
    if options.results == RESULTS:
        write_page(json.loads(RESULTS.read_text()))


def run(options: argparse.Namespace, wanted: list[str], budgets: list[Fraction], temporary: Path) -> None:
    work = options.keep or temporary
    work.mkdir(parents=True, exist_ok=True)
    described = open_model(options.model, temporary / "base", "float32")
    benchmark = Benchmark(described.folder, work, options.cache)
    if options.results.exists() and not options.fresh:
        results = json.loads(options.results.read_text())
        with load_base(benchmark.model, benchmark.placement) as loaded:
            same = results["base"]["sha256"] == fingerprint(loaded.model)
        if not same or results["settings"] != settings():
            raise SystemExit(f"{options.results} is of another model or other settings: give --fresh to begin anew.")
    else:
        name = options.name or Path(options.model).name
        results = {"model": name, "settings": settings(), "base": benchmark.base(), "rows": []}
        save(results, options.results)
    kinds: dict[str, Callable[[list[Fraction]], Iterator[Row]]] = {
        "paper": benchmark.paper,
        "ours": benchmark.ours,
        "drop": benchmark.drop,
        "linear": benchmark.linear,
    }
    for kind in wanted:
        for row in kinds[kind](budgets):
            merge(results, {**row, **provenance()}, options.results)
            print(f"{row['method']}, {row['budget']:g}%: {row['what']}, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
