"""Search, refit, validation and report of families that are no decoders with separate projections, through the CLI."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sa_convert.domain.stacks import in_stack
from sa_convert.families.table import FAMILIES
from sa_convert.read.folder import open_folder
from sa_convert.read.model_of import model_of
from sa_convert.read.names import output_name
from sa_convert.rewrite.refitted import refit_edits
from support.processes import run_cli
from support.tiny_models import geometry_of_folder, load_converted, save_tiny, save_tokenizer

RECIPE = {
    "sharing": {"search": {"key_cache": "20%"}},
    "refit": "ridge",
    "calibration": {"sequences": 6, "length": 48},
    "gate": {"max_perplexity_increase": "100%"},
}


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "falcon", "bert", "t5", "bart", "jamba"])
def test_search_and_refit_through_the_command_line(family, tmp_path):
    save_tiny(family, tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    out = tmp_path / "out"
    done = run_cli("convert", tmp_path / "base", "--recipe", tmp_path / "recipe.json", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report, entry = json.loads(done.stdout), FAMILIES[family]
    geometry = geometry_of_folder(tmp_path / "base")
    assert report["savings"]["key_cache_removed"] >= 0.2 - 1e-9
    assert report["perplexity"]["increase"] < 1
    cache = report["savings"]["cache_bytes_per_token"]
    if entry.modules.bidirectional:
        assert cache == {"before": 0, "after": 0}
        assert report["decode_check"] is None
    else:
        assert cache["after"] < cache["before"]
        assert report["decode_check"]["same_greedy_tokens"]
    shared = {label.rpartition(".")[0] for label in report["sharing"]["layers"]}
    assert shared <= {in_stack(geometry.stacks, layer).stack for layer in range(len(geometry.layers))} - {"encoder"}
    assert report["refit"]["divergence"]["after"]["text"] <= report["refit"]["divergence"]["before"]["text"]
    load_converted(out)


def test_a_refit_is_added_the_way_the_projection_holds_its_weights(tmp_path):
    """GPT-2's Conv1D holds (input, output); a change is (output, input)."""
    save_tiny("gpt2", tmp_path / "base")
    model = model_of(open_folder(tmp_path / "base"))
    change = torch.randn(64, 64)
    edits = refit_edits(model, {2: change}, tmp_path / "new.safetensors")
    name = output_name(model, 2)
    assert list(edits) == [name] == ["transformer.h.2.attn.c_proj.weight"]
    old = load_file(model.checkpoint.tensors[name].file)[name]
    torch.testing.assert_close(load_file(tmp_path / "new.safetensors")[name], old + change.T)
