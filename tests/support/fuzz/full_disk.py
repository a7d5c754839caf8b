"""A disk that is full at every write: `python -m support.fuzz.full_disk FOLDER` prints what came of it, as JSON.

Three limits, each tried at every value from nothing to enough, so that each write fails once: the size of a real file
system in memory, in pages; its number of files; and the size of a file, which needs no right to mount. The check of the
free space before the first byte is passed by, as when something else fills the disk meanwhile.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

from support.fuzz.judge import incomplete, run_captured
from support.fuzz.subjects import SHARDED, Subjects

PAGE = 4096
Usage = namedtuple("Usage", "total used free")


@dataclass
class Disks:
    """Runs that the limit ended, and those that it let pass, by its kind. not_run: kinds that cannot be had here."""

    refused: dict[str, int] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.refused.values()) + sum(self.passed.values())


def run_disks(subjects: Path, folder: Path) -> Disks:
    """In a process with a mount namespace of its own, if the system gives one."""
    bare = [sys.executable, "-m", "support.fuzz.full_disk", str(subjects), str(folder)]
    own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    may = shutil.which("unshare") is not None and subprocess.run([*own, "true"], capture_output=True).returncode == 0
    done = subprocess.run([*(own if may else []), *bare], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Disks(**json.loads(done.stdout))


def _all(subjects: Subjects, folder: Path) -> Disks:
    result = Disks()
    disk = folder / "disk"
    disk.mkdir()
    for name, option, unit in (("pages", "size", PAGE), ("files", "nr_inodes", 1)):
        for reserving in (True, False):
            told = f"{name} of a file system" + ("" if reserving else " that cannot reserve room")
            try:
                _series(result, told, subjects, partial(_mounted, disk, option, unit), reserving)
            except PermissionError:
                result.not_run.append(told)
    for reserving in (True, False):
        told = "pages of a file" + ("" if reserving else ", if no room can be reserved")
        _series(result, told, subjects, partial(_file_size, folder), reserving)
    return result


def _series(
    result: Disks,
    name: str,
    subjects: Subjects,
    limited: Callable[[int], AbstractContextManager[Path]],
    reserving: bool,
) -> None:
    """From the tightest limit on until a run succeeds three times. limited: gives a folder with that limit."""
    passed, at = 0, 1
    while passed < 3:
        with limited(at) as place:
            status, problem = _convert(subjects, place, reserving)
        if problem is not None:
            result.findings.append(f"{name}, limit {at}: {problem}")
            if len(result.findings) > 20:
                return
        passed += status == 0
        kind = result.passed if status == 0 else result.refused
        kind[name] = kind.get(name, 0) + 1
        at += 1
        if at > 5000:
            result.findings.append(f"{name}: does not succeed with any limit")
            return


def _convert(subjects: Subjects, place: Path, reserving: bool) -> tuple[int | None, str | None]:
    from sa_convert.rewrite import shards

    output = place / "out"
    model, recipe = str(subjects.folder(SHARDED)), str(subjects.recipe)
    arguments = ("convert", model, "--recipe", recipe, "-o", str(output), "--no-validate")
    before = sorted(os.listdir(place))
    room = patch("shutil.disk_usage", lambda path: Usage(1 << 40, 0, 1 << 40))
    reserve = patch.object(shards, "reserve", shards.reserve if reserving else lambda target, size: None)
    with room, reserve:
        status, out, err, broken = run_captured(arguments)
    after = sorted(os.listdir(place))
    if status == 0:
        problem = broken or incomplete(output)
        shutil.rmtree(output, ignore_errors=True)
        return status, problem
    last = err.replace("\r", "\n").strip().splitlines()[-1] if err.strip() else ""
    if broken or status != 1 or "Unexpected" in last or "Traceback" in err or out:
        return status, broken or f"exit status {status}: {last}"
    if after != before:
        return status, f"left: {after}"
    reasons = ("the disk is full", "No space left", "larger than this system allows", "File too large")
    return status, None if any(reason in last for reason in reasons) else f"another reason is given: {last}"


@contextmanager
def _mounted(disk: Path, option: str, unit: int, limit: int) -> Iterator[Path]:
    """A file system in memory of this size; raises PermissionError if mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"{option}={limit * unit}", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def _file_size(folder: Path, pages: int) -> Iterator[Path]:
    """No file of this process may be larger."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = folder / "plain"
    place.mkdir(exist_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (pages * PAGE, hard))
    try:
        yield place
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


if __name__ == "__main__":
    print(json.dumps(asdict(_all(Subjects(Path(sys.argv[1])), Path(sys.argv[2])))))
