"""Folders with low-rank keys and values give the same on transformers 4.57, but for how the two releases round."""

import os

import pytest
import torch

from support.elsewhere import LOGITS, make_job, run_elsewhere
from support.low_rank_models import convert
from support.on_transformers import attempt
from support.processes import ROOT

# Several rotary embeddings in one stack, which 4.57 makes in two modules; fused projections; norms; parts of keys.
FAMILIES = ("llama", "qwen3", "gemma3_text", "cohere2", "phi3", "gpt_neox", "gpt_oss", "opt", "bart")
RANKS = {1: {0: 5, 1: 4}, 2: {0: 6, 1: 6, 2: 6, 3: 6}, 4: {3: 6}}
# One worker makes the folders and runs the other environment once.
pytestmark = pytest.mark.xdist_group("transformers-4")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    python = os.environ.get("SA_CONVERT_TRANSFORMERS_4", str(ROOT / ".venv-transformers-4" / "bin" / "python"))
    assert os.path.exists(python), f"{python} is missing; run `make test`"
    root = tmp_path_factory.mktemp("low-rank-4")
    folders = {}
    for family in FAMILIES:
        (root / family).mkdir()
        ranks, values = RANKS, {1: {0: 7, 2: 5}, 3: {1: 6}, 4: {0: 5, 1: 5, 2: 5, 3: 5}}
        if family == "bart":  # of the decoder
            ranks, values = {6: {0: 5}, 7: {1: 4}}, {6: {0: 5}}
        folders[family] = str(convert(root / family, family, ranks, values=values).folder)
    job = make_job(folders.values())
    found = run_elsewhere(python, job, root / "elsewhere")
    assert found["transformers"].startswith("4.")
    return folders, job, found["found"]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_and_tokens(results, family):
    folders, job, found = results
    here, there = attempt(folders[family], job), found[folders[family]]
    assert "error" not in there, there
    torch.testing.assert_close(torch.tensor(there["logits"]), torch.tensor(here["logits"]), atol=3 * LOGITS, rtol=0)
    for way in job["ways"]:
        assert there[way] == here["cached"], way
