"""Folders with fewer KV groups in some layers give the same on transformers 4.57, but for how both releases round."""

import os

import pytest
import torch

from support.elsewhere import make_job, run_elsewhere
from support.on_transformers import attempt
from support.processes import ROOT
from support.whole_layers import convert_layers

FAMILIES = ("llama", "qwen2", "gemma2", "gpt_oss")
APART = 1e-3
"""The most by which a logit may differ: of Gemma 2's base, those of the two releases do by 6e-4."""

# One worker makes the folders and runs the other environment once.
pytestmark = pytest.mark.xdist_group("transformers-4")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    python = os.environ.get("SA_CONVERT_TRANSFORMERS_4", str(ROOT / ".venv-transformers-4" / "bin" / "python"))
    assert os.path.exists(python), f"{python} is missing; run `make test`"
    root = tmp_path_factory.mktemp("merge-4")
    layers = {0: "merge", 1: "{merge: {groups: 2}}", 4: "merge"}
    folders = {family: str(convert_layers(root / family, family, layers)) for family in FAMILIES}
    job = make_job(folders.values())
    found = run_elsewhere(python, job, root / "elsewhere")
    assert found["transformers"].startswith("4.")
    return folders, job, found["found"]


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_layers_on_transformers_4(results, family):
    folders, job, found = results
    here, there = attempt(folders[family], job), found[folders[family]]
    assert "error" not in there, there
    torch.testing.assert_close(torch.tensor(there["logits"]), torch.tensor(here["logits"]), atol=APART, rtol=0)
    for way in job["ways"]:
        assert there[way] == here["cached"], way
