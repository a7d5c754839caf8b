"""Runs many cases, some at a time, each in a process with little memory to spare. A process that dies is a finding."""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from support.fuzz import subjects as base
from support.fuzz.cases import Case, make_case
from support.fuzz.judge import SECONDS, judge, traceback_of
from support.fuzz.subjects import Subjects

MEMORY = 1024 * 1024 * 1024
"""Bytes that a case may take beyond what the loaded libraries have: a length in a file must not be believed."""

START = "start"
"""What a process is at before its first case."""

_SILENCE = 3 * SECONDS
"""Seconds without news of a case after which a process is killed: code in C cannot be interrupted."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a case; said: its last words. kept: where the input lies."""

    case: str
    problem: str
    said: str
    kept: str


@dataclass
class Tally:
    """What became of all cases: by kind, refused (exit 1) and accepted (exit 0)."""

    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    peak_memory: int = 0
    slowest: float = 0.0

    @property
    def cases(self) -> int:
        return self.refused.total() + self.accepted.total() + len(self.findings)


def run_cases(
    names: Sequence[str], seed: int, subjects: Subjects, keep: Path, processes: int, deadline: float
) -> Tally:
    """Run all of them, or as many as end before `deadline` (of time.monotonic). keep: where inputs of findings go."""
    tally = Tally()
    context = multiprocessing.get_context("spawn")
    left = {number: list(names[number::processes]) for number in range(processes)}
    running: dict[Connection, tuple[int, Any, str, float]] = {}

    def start(number: int) -> None:
        if left[number] and time.monotonic() < deadline:
            ours, theirs = context.Pipe(duplex=False)
            job = (theirs, left[number], seed, subjects, keep, deadline)
            process = context.Process(target=_work, args=job, daemon=True)
            process.start()
            theirs.close()
            running[ours] = (number, process, START, time.monotonic())

    for number in left:
        start(number)
    while running:
        wait(list(running), timeout=5)
        for ours in list(running):
            number, process, current, since = running[ours]
            try:
                if not ours.poll():
                    if current != START and time.monotonic() - since > _SILENCE:
                        process.kill()
                    continue
                kind, *news = ours.recv()
            except EOFError:
                process.join()
                del running[ours]
                if process.exitcode and current == START:
                    raise RuntimeError("undamaged models do not convert; see above") from None
                if process.exitcode:
                    problem = f"the process ends with {process.exitcode}"
                    tally.findings.append(Finding(current, problem, "", f"--replay '{current}'"))
                    start(number)
                continue
            if kind == "begin":
                current = news[0]
                left[number].remove(current)
            elif kind == "end":
                _count(tally, *news)
            running[ours] = (number, process, current, time.monotonic())
    return tally


def _count(tally: Tally, name: str, status: int | None, finding: Finding | None, seconds: float, memory: int) -> None:
    tally.slowest, tally.peak_memory = max(tally.slowest, seconds), max(tally.peak_memory, memory)
    if finding is not None:
        tally.findings.append(finding)
    else:
        (tally.accepted if status == 0 else tally.refused)[name.partition(":")[0]] += 1


def _work(news: Connection, names: list[str], seed: int, subjects: Subjects, keep: Path, deadline: float) -> None:
    """In a process of its own: run the cases and tell of each as it begins and ends."""
    with tempfile.TemporaryDirectory(prefix="sa-convert-fuzz-") as work:
        warm_up(Path(work), subjects, any(name.startswith("gguf") for name in names))
        limit_memory()
        # What libraries say past sys.stderr is not the command's word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for number, name in enumerate(names):
            if time.monotonic() > deadline:
                return
            news.send(("begin", name))
            began = time.monotonic()
            folder = Path(work) / f"case-{number}"
            folder.mkdir()
            try:
                status, finding = try_case(name, seed, folder, subjects, keep)
            except Exception:
                status, finding = None, Finding(name, "the case cannot be made", traceback.format_exc(), "nowhere")
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            news.send(("end", name, status, finding, time.monotonic() - began, memory))
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()


def warm_up(work: Path, subjects: Subjects, gguf: bool) -> None:
    """Convert what is not damaged, so that every library is loaded; raises AssertionError if that fails."""
    models = [subjects.folder(base.SINGLE), subjects.folder(base.SHARDED), *map(subjects.folder, subjects.families)]
    for model in [*models, *([subjects.folder("tiny.gguf")] if gguf else [])]:
        folder = work / "warm-up"
        folder.mkdir()
        recipe, output = str(subjects.recipe), str(folder / "out")
        arguments = ("convert", str(model), "--recipe", recipe, "-o", output, "--no-validate")
        verdict = judge(Case("warm-up", arguments, folder / "out"), folder, seconds=10 * SECONDS)
        assert (verdict.status, verdict.problem) == (0, None), (model, verdict)
        shutil.rmtree(folder)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def try_case(name: str, seed: int, folder: Path, subjects: Subjects, keep: Path) -> tuple[int | None, Finding | None]:
    """Exit status and finding of one case. The input of a finding is kept."""
    case = make_case(name, seed, folder, subjects)
    verdict = judge(case, folder)
    if verdict.problem is None:
        return verdict.status, None
    shutil.rmtree(folder)
    folder.mkdir()
    case = make_case(name, seed, folder, subjects)  # as it was, since the first run may have changed it
    said = verdict.said if "hangs" in verdict.problem else traceback_of(case)
    kept = keep / name.replace(":", "-").replace(" ", "-")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    make_case(name, seed, kept, subjects)
    (kept / "command.txt").write_text(f"sa-convert {' '.join(case.arguments)}\n\n{verdict.problem}\n\n{said}\n")
    return verdict.status, Finding(name, verdict.problem, said, str(kept))
