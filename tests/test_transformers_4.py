"""The same converted folders load and generate the same tokens on transformers 4.57, where sa_convert is not installed.

`make test` makes the second environment and names its Python in SA_CONVERT_TRANSFORMERS_4.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, run_cli
from tiny_models import geometry_of_folder, kinds_of, load_converted, make_map, save_tiny, write_recipe

from sa_convert.export.shared_attention_families import FAMILIES

sys.path.append(str(ROOT / "docs"))
from generate import NOT_IN_4

NEW_TOKENS = 10
# Base models for which 4.57's static cache itself raises, or generates other tokens than its dynamic cache does.
STATIC_FAILS_IN_4 = {"mvp", "trocr", "xglm"}
# One worker makes the folders and runs the other environment once.
pytestmark = pytest.mark.xdist_group("transformers-4")


def kinds(family):
    """The simplest and the most demanding kind of map."""
    return sorted({kinds_of(family)[0], kinds_of(family)[-1]})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every family in two kinds of maps, as transformers 4 ran it."""
    python = os.environ.get("SA_CONVERT_TRANSFORMERS_4", str(ROOT / ".venv-transformers-4" / "bin" / "python"))
    assert os.path.exists(python), (
        f"{python} is missing; run `make test`, or name a Python in SA_CONVERT_TRANSFORMERS_4"
    )
    root = tmp_path_factory.mktemp("transformers-4")
    folders = {}
    for family in FAMILIES:
        save_tiny(family, root / family)
        folders[family, "base"] = str(root / family)
        for kind in kinds(family):
            geometry = geometry_of_folder(root / family)
            rows = make_map(kind, geometry, seed=3)
            recipe = write_recipe(root / f"{family}-{kind}.json", rows, geometry.stacks)
            out = root / f"{family}-{kind}"
            done = run_cli("convert", root / family, "--recipe", recipe, "-o", out, "--no-validate")
            assert done.returncode == 0, done.stderr
            folders[family, kind] = str(out)
    torch.manual_seed(4)
    ids = torch.randint(3, 128, (2, 14))
    job = {"folders": list(folders.values()), "ids": ids.tolist(), "new_tokens": NEW_TOKENS}
    (root / "jobs.json").write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment["HF_MODULES_CACHE"] = str(root / "modules")
    script = ROOT / "tests" / "on_transformers_4.py"
    command = [python, str(script), str(root / "jobs.json"), str(root / "results.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return ids, folders, json.loads((root / "results.json").read_text())


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in FAMILIES for kind in kinds(family)],
)
def test_same_tokens(results, family, kind):
    ids, folders, found = results
    result = found[folders[family, kind]]
    if "absent" in result:
        assert family in NOT_IN_4, "docs/families.md says that this family runs on transformers 4.57"
        return
    assert family not in NOT_IN_4
    if FAMILIES[family].transformers_5:
        assert "need transformers 5, this is 4.57" in result["error"]
        return
    assert "error" not in result, result["error"]
    model = load_converted(Path(folders[family, kind]), dtype=torch.float32)
    entry = FAMILIES[family]
    inputs = {} if entry.bidirectional else {"use_cache": False}
    inputs |= {"decoder_input_ids": ids.flip(1)} if entry.encoder_decoder else {}
    if not entry.bidirectional:
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(ids, **options).tolist()
        assert result["cached"] == expected
        assert result["uncached"] == expected
        if result["static"] != expected:
            of_base = found[folders[family, "base"]]
            assert of_base["static"] != of_base["cached"], result["static"]
            assert family in STATIC_FAILS_IN_4
    with torch.no_grad():
        difference = (torch.tensor(result["logits"]) - model(ids, **inputs).logits[:, -1]).abs().max()
        if difference > 1e-4:
            # The two versions of transformers compute some families differently; then the base model tells how much.
            base = getattr(transformers, entry.default_class)
            base = base.from_pretrained(folders[family, "base"], dtype=torch.float32).eval()
            versions = torch.tensor(found[folders[family, "base"]]["logits"]) - base(ids, **inputs).logits[:, -1]
            assert versions.abs().max() < 0.01
            assert difference <= 3 * versions.abs().max()
