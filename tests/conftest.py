"""What every test may use: an environment that leaves no trace, and the command line as a process."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Before transformers is imported: no network, and code of converted folders is cached for this run only.
_modules = tempfile.TemporaryDirectory(prefix="sa-convert-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1", HF_MODULES_CACHE=_modules.name, TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error"
)
# Tiny models gain nothing from more threads, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sa_convert.registration  # noqa: E402

# Tests load converted folders by the code inside of them, as users do.
sa_convert.registration.cancel()

ROOT = Path(__file__).parents[1]


def run_cli(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run `sa-convert` with these arguments as a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-m", "sa_convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=540, **options)


@pytest.fixture(scope="session")
def cli():
    return run_cli
