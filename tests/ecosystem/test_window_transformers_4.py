"""Folders with windows, alone and beside shared attention and layers without any, give the same on transformers 4.57,
but for how the two releases round."""

import os

import pytest

from support.elsewhere import OPTIONS, difference, make_job, run_elsewhere
from support.on_transformers import attempt
from support.planned_folders import convert_by_plan, told, windows_for
from support.processes import ROOT
from support.tiny_models import geometry_of_folder, save_tiny

# Windows of their own, chunks, sinks, softcaps; ALiBi; positions of 4.57's making; layers without softmax attention;
# beside an encoder.
FAMILIES = (
    *("llama", "mistral", "gemma2", "gemma3_text", "qwen3", "gpt_oss", "llama4_text", "phi3"),
    *("gpt2", "gpt_neox", "falcon", "bloom", "gptj", "opt", "qwen3_next", "t5", "bart"),
)
SHARES = {4: {0: {"share": [[1, 2], [1, 3]]}, 1: {"share": [None, [0, 3]]}}}
# One worker makes the folders and runs the other environment once.
pytestmark = pytest.mark.xdist_group("transformers-4")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    python = os.environ.get("SA_CONVERT_TRANSFORMERS_4", str(ROOT / ".venv-transformers-4" / "bin" / "python"))
    assert os.path.exists(python), f"{python} is missing; run `make test`"
    root = tmp_path_factory.mktemp("windows-4")
    folders = {}
    for family in FAMILIES:
        base = root / family / "base"
        save_tiny(family, base, **OPTIONS.get(family, {}))
        plan = told(windows_for(geometry_of_folder(base)))
        folders[family] = str(convert_by_plan(base, plan, root / family / "out"))
    base = root / "llama" / "base"
    plan = {
        0: {0: {"window": {"sinks": 2, "tokens": 5}}, 2: {"window": {"sinks": 0, "tokens": 4}}},
        **SHARES,
        5: "drop",
    }
    folders["several"] = str(convert_by_plan(base, plan, root / "several"))
    bases = {family: str(root / family / "base") for family in FAMILIES} | {"several": str(root / "llama" / "base")}
    job = make_job([*folders.values(), *dict.fromkeys(bases.values())])
    found = run_elsewhere(python, job, root / "elsewhere")
    assert found["transformers"].startswith("4.")
    return folders, bases, job, found["found"]


@pytest.mark.parametrize("family", [*FAMILIES, "several"])
def test_same_logits_and_tokens(results, family):
    folders, bases, job, found = results
    there, base = found[folders[family]], found[bases[family]]
    here, base_here = attempt(folders[family], job), attempt(bases[family], make_job([bases[family]], []))
    if family == "qwen3_next":  # its cache there is of a make of its own
        assert there["cached"]["refused"]
        assert "Qwen3NextDynamicCache has no room" in there["cached"]["error"]
        there["cached"] = there["uncached"]
    assert difference(there, here, base, base_here) is None
    if family != "qwen3_next":
        assert there["static"] == here["cached"]
