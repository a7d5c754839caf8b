"""The parent's side of the processes in which models are timed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

from sa_convert import errors
from sa_convert.errors import SaConvertError

_PATIENCE = 5.0
"""Seconds that a process has to end by itself once its input has ended."""


class Worker:
    """A process that times the model called `name`; see `sa_convert.measure.speed.worker`."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: IO[bytes]) -> None:
        self.name, self._process, self._log = name, process, log

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have one thing done, and wait for it. Raises a SaConvertError for what goes wrong there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "of": self.name, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"], SaConvertError)(answer["error"])
        return answer

    def _ended(self) -> SaConvertError:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return SaConvertError(
                f"{self.name}: the process that ran it was killed, most likely for lack of memory (both models are in "
                "memory at once): give smaller --contexts or --batches, or a narrower --dtype."
            )
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return SaConvertError(
            f"{self.name}: the process that ran it ended with status {status}: {said[-1] if said else 'no message'}"
        )


@contextmanager
def workers(names: Sequence[str]) -> Iterator[list[Worker]]:
    """One process for each model; whatever ends the block, none of them stays."""
    with ExitStack() as stack:
        yield [stack.enter_context(_worker(name)) for name in names]


@contextmanager
def _worker(name: str) -> Iterator[Worker]:
    with TemporaryDirectory(prefix="sa-convert-bench-") as temporary, TemporaryFile() as log:
        environment = {
            **os.environ,
            # A process that is killed leaves its temporary files behind.
            "TMPDIR": temporary,
            # As this process finds its modules, however it was started; but not code of other folders that it loaded,
            # which transformers would take for all that there is.
            "PYTHONPATH": os.pathsep.join(
                path for path in sys.path if path and not os.path.isdir(os.path.join(path, "transformers_modules"))
            ),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "sa_convert.measure.speed.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("SA_CONVERT_DEBUG") else log,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is for us, and we end the process
        )
        finished = False
        try:
            yield Worker(name, process, log)
            finished = True
        finally:
            _end(process, _PATIENCE if finished else 0.0)


def _end(process: "subprocess.Popen[str]", patience: float) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
