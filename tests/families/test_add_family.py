"""A person adds a family by copying a neighbour's file, as docs/families.md says; no code changes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from sa_convert.families.table import HOME, families_in
from support.forced_softmax import forced
from support.processes import ROOT
from support.tiny_models import attentions_of, load_converted, save_tiny, write_recipe

RUN = """
import sys
from pathlib import Path
from sa_convert.families.table import FAMILIES, families_in
vars(FAMILIES).update(vars(families_in(Path(sys.argv.pop(1)))))
from sa_convert.commands.main import run
sys.exit(run())
"""
ROWS = {2: [[1, 3], None, [1, 1], [1, 0], None, None, [0, 5], [1, 6]]}


@pytest.fixture
def families(tmp_path):
    """A folder of one family, Llama."""
    (tmp_path / "families").mkdir()
    shutil.copy(HOME / "llama.json", tmp_path / "families")
    return tmp_path / "families"


def convert(families, folder, output):
    recipe = write_recipe(output.parent / "recipe.json", ROWS)
    command = [
        sys.executable,
        "-c",
        RUN,
        families,
        "convert",
        folder,
        "--recipe",
        recipe,
        "-o",
        output,
        "--no-validate",
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_a_copied_neighbour_converts(families, tmp_path):
    base = save_tiny("qwen3", tmp_path / "base", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)
    refused = convert(families, tmp_path / "base", tmp_path / "out")
    assert refused.returncode == 1
    assert "'qwen3' are not supported" in refused.stderr
    assert refused.stderr.rstrip().endswith("Supported types: llama.")

    entry = json.loads(shutil.copy(families / "llama.json", families / "qwen3.json").read_text())
    entry |= {"config_class": "Qwen3Config", "default_class": "Qwen3ForCausalLM"}
    entry["modules"] = {"query_norm": "q_norm", "key_norm": "k_norm"}
    (families / "qwen3.json").write_text(json.dumps(entry))
    done = convert(families, tmp_path / "base", tmp_path / "out")
    assert done.returncode == 0, done.stderr

    ids = torch.arange(3, 60).reshape(3, 19)
    with torch.no_grad():
        with forced(base, attentions_of(base, families_in(families)["qwen3"]), ROWS):
            expected = base(ids).logits
        assert (expected - base(ids).logits).abs().max() > 1e-3
        logits = load_converted(tmp_path / "out", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_word_that_no_field_has_is_named(families, tmp_path):
    save_tiny("qwen3", tmp_path / "base")
    entry = {
        "like": "llama",
        "config_class": "Qwen3Config",
        "default_class": "Qwen3ForCausalLM",
        "modules": {"norms": 1},
    }
    (families / "qwen3.json").write_text(json.dumps(entry))
    failed = convert(families, tmp_path / "base", tmp_path / "out")
    assert f"{families / 'qwen3.json'}: modules.norms is unknown; there are layers, attention," in failed.stderr
