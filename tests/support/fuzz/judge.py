"""Runs one command in this process, and says what is wrong with how it ended."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from support.fuzz.cases import Case

SECONDS = 20
"""For one case, on a busy machine; most take a hundredth of a second."""

LONGEST = 3010
"""Characters of one line of error."""

_PROGRESS = re.compile(r"\S.* \.\.\.|Note: .*|.*\d+%\|.*|.*\d+(\.\d+)?[kMG]?B?/s\]")


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for one of its own."""


@dataclass(frozen=True)
class Verdict:
    """status: what the command ended with, or None. problem: what is wrong, or None. said: its last words."""

    status: int | None
    problem: str | None
    said: str


def judge(case: Case, folder: Path, seconds: int = SECONDS) -> Verdict:
    """Run a case whose input is in `folder`, and remove what it rightly made. seconds: after which it hangs."""
    before = _listing(folder)
    status, out, err, broken = run_captured(case.arguments, seconds)
    made = case.output if status == 0 else None
    problem = broken or _problem(case, status, out, err) or _left(folder, before, made)
    if problem is None and status == 0 and case.output is not None:
        problem = incomplete(case.output)
    if case.output is not None:
        shutil.rmtree(case.output, ignore_errors=True)
    return Verdict(status, problem, err.strip()[-LONGEST:])


def run_captured(arguments: Sequence[str], seconds: int = SECONDS) -> tuple[int | None, str, str, str | None]:
    """Exit status, standard output and error, and what went wrong beyond that. No traceback is asked for."""
    from sa_convert.commands.main import run

    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    status, broken = None, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with _no_longer_than(seconds):
                status = run(arguments)
        except Hang:
            broken = f"hangs: not done after {seconds} s"
        except BaseException as error:
            broken = f"{type(error).__name__} leaves the command: {error}"
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]  # type: ignore[attr-defined]
    return status, texts[0], texts[1], broken


@contextlib.contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _problem(case: Case, status: int | None, out: str, err: str) -> str | None:
    """What is wrong with the words and the status."""
    if "Traceback" in err:
        return "a traceback"
    if "Error: Unexpected " in err:
        return "an error that nobody expected"
    if status == 0:
        if "Error: " in err:
            return "an error, but exit status 0"
        if "--json" in case.arguments:
            return _not_json(out)
        return None if case.arguments[0] == "recipes" else _unprintable(out)
    if status != 1:
        return f"exit status {status}"
    if out:
        return "an error, but text on standard output"
    lines = err.replace("\r", "\n").strip("\n").split("\n")
    if not lines[-1].startswith("Error: "):
        return "the last line is no error"
    if sum(line.startswith("Error: ") for line in lines) > 1:
        return "two lines of error"
    other = next((line for line in lines[:-1] if line.strip() and not _PROGRESS.fullmatch(line.strip())), None)
    if other is not None:
        return f"another line beside the error: {other[:200]}"
    if len(lines[-1]) > LONGEST:
        return f"a line of error with {len(lines[-1]):,} characters"
    return _unprintable(lines[-1])


def _unprintable(text: str) -> str | None:
    odd = next((character for character in text if not character.isprintable() and character != "\n"), None)
    return f"the character {odd!a} would reach the terminal" if odd else None


def _not_json(out: str) -> str | None:
    def never(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        content = json.loads(out, parse_constant=never)
    except ValueError as error:
        return f"--json, but standard output is no JSON: {error}"
    return None if isinstance(content, dict) else "--json, but standard output is no object"


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path in the folder, with size and time of change."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            stat = path.lstat()
            found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns if name in files else 0)
    return found


def _left(folder: Path, before: dict[str, tuple[int, int]], output: Path | None) -> str | None:
    """What is in the folder that was not, or no longer as it was."""
    made = "" if output is None else output.name
    before, after = ({name: stat for name, stat in listing.items() if not made or name.split("/")[0] != made}
                     for listing in (before, _listing(folder)))  # fmt: skip
    if after == before:
        return None
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return f"left behind or changed: {', '.join(changed[:5])}"


def incomplete(output: Path) -> str | None:
    """What a converted folder lacks. Headers are read by the safetensors library, which shares no code with ours."""
    from safetensors import safe_open

    expected = ("config.json", "report.json", "recipe.yaml", "README.md", "modeling_shared_attention.py")
    missing = [name for name in expected if not (output / name).is_file()]
    if missing:
        return f"exit status 0, but the output lacks {', '.join(missing)}"
    try:
        for name in ("config.json", "report.json"):
            json.loads((output / name).read_text("utf-8"))
        held = {}
        for file in sorted(output.rglob("*.safetensors")):
            with safe_open(file, "numpy") as opened:
                held |= dict.fromkeys(opened.keys(), file.relative_to(output).as_posix())
        index = output / "model.safetensors.index.json"
        if index.exists():
            named = json.loads(index.read_text("utf-8"))["weight_map"]
            if named != held:
                return "exit status 0, but the index names other tensors than the files hold"
        elif not held:
            return "exit status 0, but the output has no tensors"
    except Exception as error:
        return f"exit status 0, but the output cannot be read: {type(error).__name__}: {error}"
    return None


def traceback_of(case: Case) -> str:
    """The same case again, with the traceback that users do not see."""
    os.environ["SA_CONVERT_DEBUG"] = "1"
    try:
        _, _, err, _ = run_captured(case.arguments)
    finally:
        del os.environ["SA_CONVERT_DEBUG"]
        if case.output is not None:
            shutil.rmtree(case.output, ignore_errors=True)
    sys.stderr.flush()
    return err[-4000:]
