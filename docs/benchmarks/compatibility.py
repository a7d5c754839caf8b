"""Writes docs/compatibility.md: which releases of transformers run the folders that the pinned one makes.

    python docs/benchmarks/compatibility.py                   # every release, in half an hour or more
    python docs/benchmarks/compatibility.py --only 5.0 5.24   # prints what these do, and writes nothing

Tiny random models of the families that `tests/support/elsewhere.py` lists are converted once, by maps of spans, groups
and heads. Then the last release of each minor, from 4.57 on, is installed into a folder (without torch, which is that
of this environment) and runs `tests/support/on_transformers.py`, a process that cannot import sa_convert. What it finds
is compared with what the pinned release finds.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
FIRST = (4, 57)
sys.path.insert(0, str(ROOT / "tests"))

import conftest  # noqa: E402, F401 - the environment of tests
from support.elsewhere import KINDS, MINIMUM, Folders, difference, make_folders, make_job, run_elsewhere  # noqa: E402

SAID = {"refused": "refused", "broken": "broken", "base": "like the base"}
TITLES = {"span": "spans", "groups": "groups", "heads": "heads"}
HEAD = """# Releases of transformers

This page is written by `python docs/benchmarks/compatibility.py`. Models of {count} families, tiny and random, were
converted on transformers {pinned} (torch {torch}). Each was converted by a map of spans (whole layers), by one of
groups (whole KV groups) and by one of single heads. The folders were then loaded on the last release of each minor
version that the registry served, by the code inside of them, in processes that cannot import sa_convert. The families
are {families}.

| word | meaning |
|---|---|
| run | It loads. Its logits equal those on {pinned} (1e-4, float32). Its tokens are the same, cached and not |
| refused | its code says in a sentence which release it needs |
| like the base | the unconverted model itself fails on that release, or says other things there than on {pinned} |
| broken | anything else |

If the base model's logits differ between the releases, those of a folder may differ by three times as much.

| transformers | {titles} |
|---|{rules}
"""
TAIL = """
## Treatments beside sharing

The maps above share attention. Folders with other treatments run on 4.57.6 and on the pinned release, in `make test`:
the same logits and tokens there as here, with a growing cache, with none and with a static one. Releases between them
were not run with these.

| treatment | families | command |
|---|---|---|
| window | 17, and `llama` with two more treatments | `pytest tests/ecosystem/test_window_transformers_4.py` |
| low_rank | 9 | `pytest tests/ecosystem/test_low_rank_transformers_4.py` |
| merge | 4 | `pytest tests/ecosystem/test_merge_transformers_4.py` |
| linear, drop | 8 | `pytest tests/ecosystem/test_drop_transformers_4.py` |

Before 5.0, Qwen 3 Next has a cache of a make of its own. A folder of it with windows runs there without a cache, and
refuses that one by a sentence.

## New releases

`make test` ends with a look at the newest release. `tests/support/newest.py` asks the registry for it. If it is not the
pinned one, it is installed into `.venv-newest`, with the newest of everything else but torch. The folders above, made
by the pinned release, must then run there as they do on the pinned one. `convert` (with a search, a refit and
validation), `evaluate` and `bench` must run there themselves.

What came out is printed last and written to `build/newest.txt`.

| what came out | exit status of `make test` |
|---|---|
| the newest release is the pinned one, and something fails | that of the failure |
| a newer release breaks something | not changed: a release breaks what it breaks, whatever is being landed |
| the registry does not answer, or the environment cannot be made | not changed |

`make test-newest` runs every test in that environment. To move to a new release, write it into `constraints.txt`, and
run `python docs/generate.py`, `python docs/benchmarks/smoke.py` and `python docs/benchmarks/compatibility.py`.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one folder on one release: "runs", "refused", "broken", or "base" if its base does not do there
    what it does on the pinned release either; and why."""

    release: str
    family: str
    kind: str
    what: str
    why: str = ""


def releases() -> list[str]:
    """The last release of each minor version from FIRST on, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", listed)
    assert found, listed
    newest: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name in re.findall(r"\d+\.\d+(?:\.\d+)?", found.group(1)):
        parts = tuple(map(int, name.split(".")))
        newest[parts[:2]] = max(parts, newest.get(parts[:2], ()))
    return [".".join(map(str, newest[minor])) for minor in sorted(newest) if minor >= FIRST]


def install(release: str, folder: Path) -> None:
    """transformers and what it needs beside torch."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(folder)]
    done = subprocess.run([*command, f"transformers=={release}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def outcomes(release: str, folders: Folders, found: dict[str, Any], pinned: dict[str, Any]) -> Iterator[Outcome]:
    """What became of every converted folder; found: on this release."""
    for (family, kind), folder in folders.items():
        if kind == "base":
            continue
        base = folders[family, "base"]
        if "absent" in found[folder]:
            yield Outcome(release, family, kind, "refused", f"this release has no {found[folder]['absent']}")
            continue
        if "error" in pinned[folder]:
            yield Outcome(
                release, family, kind, "broken", f"it does not run on the pinned one: {pinned[folder]['error']}"
            )
            continue
        why = difference(found[folder], pinned[folder], found[base], pinned[base])
        if why is None:
            yield Outcome(release, family, kind, "runs")
            continue
        results = (found[folder], *(found[folder].get(way) for way in ("cached", "uncached")))
        refused = any(isinstance(result, dict) and result.get("refused") for result in results)
        of_base = difference(found[base], pinned[base], found[base], found[base])
        what = "refused" if refused else "base" if of_base else "broken"
        yield Outcome(release, family, kind, what, " ".join((of_base if what == "base" else why).split()))


def cell(outcomes: list[Outcome]) -> str:
    """Such as "11 of 13 run, 2 refused"."""
    number = {what: sum(outcome.what == what for outcome in outcomes) for what in ("runs", *SAID)}
    text = f"{number['runs']} of {len(outcomes)} run"
    return text + "".join(f", {number[what]} {said}" for what, said in SAID.items() if number[what])


def reasons(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """One line for each reason, with the releases that give it and the families and kinds that it concerns."""
    concerned: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for outcome in outcomes:
        if outcome.what != "runs":
            why = outcome.why.replace(f"shared_attention_{outcome.family} ", "this type ")
            families = concerned.setdefault((outcome.release, SAID[outcome.what], why), {})
            families.setdefault(outcome.family, []).append(TITLES[outcome.kind])
    releases: dict[str, list[str]] = {}
    for (release, said, why), families in concerned.items():
        which = ", ".join(f"`{family}` ({', '.join(kinds)})" for family, kinds in families.items())
        releases.setdefault(f"{said}: {which}: {why}", []).append(release)
    for text, named in releases.items():
        yield f"- {', '.join(named)}, {text}\n"


def page(every: list[Outcome], pinned: str) -> str:
    import torch

    text = HEAD.format(
        count=len(MINIMUM),
        families=", ".join(f"`{family}`" for family in MINIMUM),
        pinned=pinned,
        torch=torch.__version__.partition("+")[0],
        titles=" | ".join(TITLES[kind] for kind in KINDS),
        rules="---|" * len(KINDS),
    )
    for release in dict.fromkeys(outcome.release for outcome in every):
        of = [[outcome for outcome in every if (outcome.release, outcome.kind) == (release, kind)] for kind in KINDS]
        text += f"| {release}{' (pinned)' if release == pinned else ''} | {' | '.join(map(cell, of))} |\n"
    why = list(reasons(every))
    return text + "".join(["\n## Refused and broken\n\n", *why] if why else []) + TAIL


def run(release: str, root: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What `on_transformers.py` finds on a release, which is installed for it and removed again."""
    with tempfile.TemporaryDirectory(dir=root) as packages:
        install(release, Path(packages))
        result = run_elsewhere(sys.executable, job, root / f"on-{release}", Path(packages))
    assert result["transformers"] == release
    found: dict[str, Any] = result["found"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="X.Y", help="minor versions to run; the page is not written")
    parser.add_argument("--jobs", type=int, default=2, help="releases that run at the same time")
    options = parser.parse_args()
    wanted, pinned = releases(), version("transformers")
    if options.only:
        wanted = [release for release in wanted if release.rpartition(".")[0] in options.only]
    every: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory(prefix="sa-convert-compatibility-") as name,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        root = Path(name)
        folders = make_folders(root, dict.fromkeys(MINIMUM, KINDS))
        job = make_job(folders.values(), ["cached", "uncached"])
        expected = run_elsewhere(sys.executable, job, root / "pinned")["found"]
        for release, result in zip(wanted, pool.map(lambda release: run(release, root, job), wanted), strict=True):
            found = list(outcomes(release, folders, result, expected))
            of = {TITLES[kind]: [outcome for outcome in found if outcome.kind == kind] for kind in KINDS}
            print(release, *(f"{title}: {cell(some)}" for title, some in of.items()), sep="\t")
            print(*reasons(found), sep="", flush=True)
            every += found
    if not options.only:
        PAGE.write_text(page(every, pinned), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
