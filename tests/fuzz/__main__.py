"""`make fuzz`, or PYTHONPATH=.:tests python -m fuzz: everything in this folder, within a number of minutes.

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

from fuzz import subjects as base
from fuzz.cases import KINDS, case_names, make_case
from fuzz.full_disk import run_disks
from fuzz.kills import RECIPE, large_model, measure, run_kills
from fuzz.page import tables, write_page
from fuzz.races import run_races
from fuzz.subjects import Subjects, make_subjects
from fuzz.workers import run_cases

MEGABYTES = 110
"""Size of the model that runs are killed over: its copy takes about as long as Python takes to start."""

ENDS = {"cases": 0.55, "races": 0.7, "kills": 0.93}
"""Of all the time, when a part stops. What a part leaves over, the next ones have; full disks take half a minute."""


def main() -> int:
    arguments = _arguments()
    keep = Path(arguments.keep).absolute()
    with tempfile.TemporaryDirectory(prefix="sa-convert-fuzz-") as work:
        subjects = make_subjects(Path(work) / "subjects", families=True)
        if arguments.replay:
            folder = Path(arguments.keep) / arguments.replay.replace(":", "-").replace(" ", "-")
            folder.mkdir(parents=True)
            print("sa-convert", *make_case(arguments.replay, arguments.seed, folder.absolute(), subjects).arguments)
            return 0
        result = _run(arguments, subjects, Path(work), keep)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables(result))
    findings = result["findings"]
    for finding in findings:
        print(finding, file=sys.stderr)
    if arguments.page and not findings:
        write_page(Path(arguments.page), result)
    return 1 if findings else 0


def _run(arguments: argparse.Namespace, subjects: Subjects, work: Path, keep: Path) -> dict[str, Any]:
    began, whole = time.monotonic(), 60 * arguments.minutes
    ends = {part: began + share * whole for part, share in ENDS.items()}
    _say("damaged input")
    names = case_names(arguments.cases)
    tally = run_cases(names, arguments.seed, subjects, keep, arguments.processes, ends["cases"])
    _say("full disks")
    disks = run_disks(subjects.root, _new(work / "disks"))
    _say("two runs at once")
    middle = large_model(work / "middle", 44)
    races = run_races(middle, arguments.races, arguments.seed, _new(work / "races"), ends["races"])
    _say("kills")
    folder = _new(work / "kills")
    recipe = work / "kills.yaml"
    recipe.write_text(RECIPE)
    copied = measure(large_model(work / "large", MEGABYTES), recipe, _new(folder / "a"), "--no-validate")
    validated = measure(subjects.folder(base.VALIDATED), recipe, _new(folder / "b"))
    few = arguments.kills // 10
    scenes = [(copied, arguments.kills - few), (validated, few)]
    kills = run_kills(scenes, arguments.seed, folder, arguments.processes, ends["kills"])
    found = [f"{at.case}: {at.problem} ({at.kept})" for at in tally.findings]
    return {
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - began),
        "processes": arguments.processes,
        "cases": {
            "asked": arguments.cases,
            "done": tally.cases,
            "kinds": {kind: [tally.refused[kind], tally.accepted[kind]] for kind in KINDS},
            "slowest_seconds": round(tally.slowest, 2),
            "peak_memory_bytes": tally.peak_memory,
        },
        "kills": {"asked": arguments.kills, "done": kills.count, "signals": kills.signals, "reached": kills.reached},
        "disks": {key: value for key, value in asdict(disks).items() if key != "findings"},
        "races": {"asked": arguments.races, "done": races.count, "outcomes": races.outcomes},
        "findings": [*found, *kills.findings, *disks.findings, *races.findings],
    }


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _say(part: str) -> None:
    print(f"{part} ...", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fuzz", description="Damaged input, kills, full disks, races.")
    parser.add_argument("--cases", type=int, default=10_000, help="damaged inputs")
    parser.add_argument("--kills", type=int, default=200, help="runs that are killed; a tenth of them with validation")
    parser.add_argument("--races", type=int, default=40, help="pairs of runs into one destination")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="parts that take longer are cut short")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--keep", default="fuzz-findings", help="folder for the inputs that show a fault")
    parser.add_argument("--json", help="file for the counts")
    parser.add_argument("--page", help="docs/reliability.md, whose tables are written anew if nothing was found")
    parser.add_argument("--replay", metavar="CASE", help="only write the input of a case, such as header:17, to --keep")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
