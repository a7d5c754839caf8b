"""`make fuzz`, or PYTHONPATH=.:tests python -m support.fuzz: everything in this folder, within a number of minutes.

Exit status 1 if anything was found; what was damaged in which way is then kept in the folder that the report names.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.fuzz import subjects as base
from support.fuzz.cases import KINDS, case_names, make_case
from support.fuzz.full_disk import run_disks
from support.fuzz.kills import RECIPE, large_model, measure, run_kills
from support.fuzz.page import tables, write_page
from support.fuzz.races import run_races
from support.fuzz.subjects import Subjects, make_subjects
from support.fuzz.workers import run_cases

MEGABYTES = 110
"""Size of the model that runs are killed over: its copy takes about as long as Python takes to start."""


def main() -> int:
    arguments = _arguments()
    keep = Path(arguments.keep).absolute()
    with tempfile.TemporaryDirectory(prefix="sa-convert-fuzz-") as work:
        subjects = make_subjects(Path(work) / "subjects", families=True)
        if arguments.replay:
            folder = keep / arguments.replay.replace(":", "-").replace(" ", "-")
            folder.mkdir(parents=True)
            print("sa-convert", *make_case(arguments.replay, arguments.seed, folder, subjects).arguments)
            return 0
        known = Path(arguments.json) if arguments.json else None
        result = json.loads(known.read_text("utf-8")) if known and known.exists() else {}
        began = time.monotonic()
        for part in arguments.parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            started = time.monotonic()
            deadline = began + 60 * arguments.minutes * PARTS[part][1]
            content, findings = PARTS[part][0](arguments, subjects, _new(Path(work) / part), keep, deadline)
            seconds, processes = round(time.monotonic() - started), arguments.processes
            told = {"seed": arguments.seed, "seconds": seconds, "processes": processes, "findings": findings}
            result[part] = {**told, **content}
    if known:
        known.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables(result))
    found = [finding for part in result.values() for finding in part["findings"]]
    for finding in found:
        print(finding, file=sys.stderr)
    if arguments.page and not found:
        write_page(Path(arguments.page), result)
    return 1 if found else 0


Outcome = tuple[dict[str, Any], list[str]]
"""Counts, and a sentence for each fault."""


def _damage(arguments: argparse.Namespace, subjects: Subjects, folder: Path, keep: Path, deadline: float) -> Outcome:
    names = case_names(arguments.cases)
    tally = run_cases(names, arguments.seed, subjects, keep, arguments.processes, deadline)
    counts = {
        "asked": arguments.cases,
        "done": tally.cases,
        "kinds": {kind: [tally.refused[kind], tally.accepted[kind]] for kind in KINDS},
        "slowest_seconds": round(tally.slowest, 2),
        "peak_memory_bytes": tally.peak_memory,
    }
    return counts, [f"{finding.case}: {finding.problem} ({finding.kept})" for finding in tally.findings]


def _disks(arguments: argparse.Namespace, subjects: Subjects, folder: Path, keep: Path, deadline: float) -> Outcome:
    counts = asdict(run_disks(subjects.root, folder))
    return counts, counts.pop("findings")


def _races(arguments: argparse.Namespace, subjects: Subjects, folder: Path, keep: Path, deadline: float) -> Outcome:
    model = large_model(folder / "model", 44)
    races = run_races(model, arguments.races, arguments.seed, folder, deadline)
    return {"asked": arguments.races, "done": races.count, "outcomes": races.outcomes}, races.findings


def _kills(arguments: argparse.Namespace, subjects: Subjects, folder: Path, keep: Path, deadline: float) -> Outcome:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    copied = measure(large_model(folder / "model", MEGABYTES), recipe, _new(folder / "a"), "--no-validate")
    validated = measure(subjects.folder(base.VALIDATED), recipe, _new(folder / "b"))
    few = arguments.kills // 10
    scenes = [(copied, arguments.kills - few), (validated, few)]
    kills = run_kills(scenes, arguments.seed, folder, arguments.processes, deadline)
    counts = {"asked": arguments.kills, "done": kills.count, "signals": kills.signals, "reached": kills.reached}
    return counts, kills.findings


PARTS = {"damage": (_damage, 0.55), "disks": (_disks, 1), "races": (_races, 0.7), "kills": (_kills, 0.93)}
"""What is run in which order, and when it stops, of all the time. What a part leaves over, the next ones have; full
disks take half a minute."""


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m support.fuzz", description="Damaged input, kills, full disks, races.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to run; default: all")
    parser.add_argument("--cases", type=int, default=10_000, help="damaged inputs")
    parser.add_argument("--kills", type=int, default=200, help="runs that are killed; a tenth of them with validation")
    parser.add_argument("--races", type=int, default=40, help="pairs of runs into one destination")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="parts that take longer are cut short")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--keep", default="fuzz-findings", help="folder for the inputs that show a fault")
    parser.add_argument("--json", help="file for the counts; those of parts that are not run stay")
    parser.add_argument("--page", help="docs/reliability.md, whose tables are written anew if nothing was found")
    parser.add_argument("--replay", metavar="CASE", help="only write the input of a case, such as header:17, to --keep")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
