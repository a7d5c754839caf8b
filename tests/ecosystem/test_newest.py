"""The newest release of transformers: folders that the pinned one made, and the tool itself. Part of it, that is; the
whole is `make test-newest`.

These tests are marked, and left out unless `-m newest` is given: they need another environment, and what they find is
no fault of the change that they run beside. `tests/support/newest.py` runs them for `make test`, and names in
SA_CONVERT_NEWEST the Python of that environment.
"""

import json
import os
import sys

import pytest

from support.elsewhere import KINDS, MINIMUM, difference, make_folders, make_job, run_elsewhere
from support.processes import run_cli
from support.validation_models import save_base

pytestmark = [pytest.mark.newest, pytest.mark.xdist_group("newest")]


@pytest.fixture(scope="module")
def python():
    return os.environ["SA_CONVERT_NEWEST"]


@pytest.fixture(scope="module")
def results(python, tmp_path_factory):
    """The folders, and what the newest transformers and the pinned one make of them."""
    root = tmp_path_factory.mktemp("newest")
    folders = make_folders(root, dict.fromkeys(MINIMUM, KINDS))
    job = make_job(folders.values())
    pinned = run_elsewhere(sys.executable, job, root / "pinned")
    return folders, run_elsewhere(python, job, root / "newest")["found"], pinned["found"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", MINIMUM)
def test_folder_of_the_pinned_release(results, family, kind):
    folders, newest, pinned = results
    folder, base = folders[family, kind], folders[family, "base"]
    assert "error" not in pinned[folder], pinned[folder]["error"]
    assert difference(newest[folder], pinned[folder], newest[base], pinned[base]) is None
    if "static" in pinned[folder]:
        assert newest[folder]["static"] == pinned[folder]["static"]


def test_tool(python, tmp_path):
    """Search, refit, validation, evaluation and timing."""
    base, out = save_base(tmp_path / "base"), tmp_path / "out"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps(
            {
                "sharing": {"search": {"key_cache": "25%"}},
                "refit": "ridge",
                "calibration": {"text": "builtin", "sequences": 8, "length": 48},
                "gate": {"max_perplexity_increase": "90%"},
            }
        )
    )
    small = ("--device", "cpu", "--json")
    few = ("--contexts", 12, "--batches", 1, "--new-tokens", 4, "--repeats", 1)
    commands = (
        ("convert", base, "--recipe", recipe, "-o", out, *small),
        ("evaluate", out, "--against", base, "--sequences", 2, "--length", 64, *small),
        ("bench", out, "--against", base, *few, *small),
    )
    for command in commands:
        done = run_cli(*command, python=python)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        if command[0] == "convert":
            assert told["savings"]["key_cache_removed"] > 0
            assert told["decode_check"]["same_greedy_tokens"]
