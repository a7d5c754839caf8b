"""Memory of a healing: logits of a whole batch are never there, however many rows a step has and however many tokens
the model knows."""

import os
import subprocess
import sys

import pytest

from support.cli_cases import SPAN
from support.processes import ROOT, run_cli
from support.tiny_models import save_tiny, save_tokenizer, write_recipe

VOCABULARY = 50_000
ROWS, LENGTH = 16, 256
LOGITS = 4 * VOCABULARY * ROWS * LENGTH
"""Bytes of the logits of one model in one step: 820 MB. Loss and gradient would need three times as many."""

PEAK = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "sa_convert", *sys.argv[1:]], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(done.returncode)
"""


def peak(*arguments: object) -> int:
    """The most memory of a process of the command, in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_memory_does_not_grow_with_the_logits_of_a_step(tmp_path):
    save_tiny("llama", tmp_path / "base", vocab_size=VOCABULARY)
    save_tokenizer(tmp_path / "base")
    recipe = write_recipe(tmp_path / "span.json", SPAN)
    done = run_cli("convert", tmp_path / "base", "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    assert done.returncode == 0, done.stderr
    told = ("heal", tmp_path / "out", "--against", tmp_path / "base", "--length", LENGTH, "--no-validate")
    few, many = (
        peak(*told, "-o", tmp_path / f"{rows}", "--rows", rows, "--tokens", rows * LENGTH * 2) for rows in (4, ROWS)
    )
    assert many - few < 0.4 * LOGITS
