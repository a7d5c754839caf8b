"""The command line as a process, and programs that run where only torch and transformers are, and not sa_convert."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# sa_convert may be installed for development, beside torch: there it is hidden, as if it were not.
_PRELUDE = """
import importlib.abc, json, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sa_convert":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
try:
    import sa_convert
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("sa_convert is not hidden")

def report(**found):
    assert "sa_convert" not in sys.modules
    with open("found.json", "w") as file:
        json.dump(found, file)
"""


def run_cli(*arguments: object, python: str = sys.executable, **options) -> subprocess.CompletedProcess:
    """Run `sa-convert` with these arguments as a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [python, "-m", "sa_convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540, **options)


def run_without_sa_convert(program: str, folder: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the program gave to its function `report`, as keywords; it runs in `folder`, where it may write."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    modules = {"HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _PRELUDE + program],
        cwd=folder,
        env={**inherited, **modules, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def run_in_two(
    *arguments: object, prelude: str = "", env: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess]:
    """The command line by two processes that know of each other, as launchers start them. prelude: Python code that
    runs first in either; `rank` is its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        f"import os\nrank = int(os.environ['RANK'])\n{prelude}\nfrom sa_convert.commands.main import main\nmain()\n"
    )
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in ("0", "1"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **told, "RANK": rank, "LOCAL_RANK": rank, **(env or {})}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, arguments)],
                env={**environment, "ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        # The second first: it ends when the first does, and its pipes are the smaller ones.
        outputs = [one.communicate(timeout=300) for one in reversed(started)][::-1]
    finally:
        for one in started:
            one.kill()
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *output)
        for one, output in zip(started, outputs, strict=True)
    ]
