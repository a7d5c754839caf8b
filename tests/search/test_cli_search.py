"""`convert` with a search and a refit, as a process: planted facts are found, and bad input is refused clearly."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.cli_cases import digests, refused
from support.planted import found_map, save_planted, save_reader

CALIBRATION = {"text": "builtin", "sequences": 8, "length": 48}


@pytest.fixture
def write(tmp_path):
    def write_recipe(search, refit="none", **keys):
        recipe = {
            "sharing": {"search": search}, "refit": refit, "calibration": CALIBRATION,
            "gate": {"max_perplexity_increase": "90%"}, **keys,
        }  # fmt: skip
        path = tmp_path / "search.json"
        path.write_text(json.dumps(recipe))
        return path

    return write_recipe


def test_a_planted_duplicate_is_found_removed_and_costs_nothing(cli, write, tmp_path):
    base = save_planted(tmp_path / "base", {2: 1})
    result = cli("convert", base, "--recipe", write({"key_cache": "4%"}), "-o", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    assert found_map(tmp_path / "out") == {"1": [None, None, None, None, [0, 2], [0, 3], None, None]}
    report = json.loads(result.stdout)
    assert report["savings"]["key_cache_removed"] == pytest.approx(1 / 24, abs=1e-6)
    assert abs(report["perplexity"]["increase"]) < 1e-5
    assert report["copying"]["loss"]["after"] == pytest.approx(report["copying"]["loss"]["before"], abs=1e-4)


def test_a_planted_permutation_of_heads_is_undone(cli, write, tmp_path):
    order = {0: 2, 1: 3, 2: 1, 3: 0}
    base = save_planted(tmp_path / "base", order)
    recipe = write({"key_cache": "16.6%"}, refit="ridge")
    result = cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    expected = [[0, 2 * order[group] + head] for group in range(4) for head in range(2)]
    assert found_map(tmp_path / "out") == {"1": expected}
    report = json.loads(result.stdout)
    assert abs(report["perplexity"]["increase"]) < 1e-4
    # There is nothing to mend, so a refit would only fit noise.
    assert report["refit"]["share"] == 0 or report["refit"]["divergence"]["after"]["text"] <= 1e-6


def test_the_resolved_recipe_gives_the_same_folder_without_searching(cli, base, write, tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    first = cli("convert", base, "--recipe", write({"key_cache": "25%"}, refit="ridge"), "-o", once)
    assert first.returncode == 0, first.stderr
    second = cli("convert", base, "--recipe", once / "recipe.yaml", "-o", again)
    assert second.returncode == 0, second.stderr
    assert "costs, round" in first.stderr
    assert "costs, round" not in second.stderr
    ours, theirs = digests(once), digests(again)
    assert {name for name in ours if ours[name] != theirs[name]} == {"report.json"}  # it names the recipe's file
    assert ours.keys() == theirs.keys()


def test_the_refit_changes_the_output_projections_that_the_report_names_and_nothing_else(cli, base, write, tmp_path):
    result = cli(
        "convert",
        base,
        "--recipe",
        write({"key_cache": "25%"}, refit="ridge", calibration={**CALIBRATION, "length": 64}),
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    refit = json.loads(result.stdout)["refit"]
    assert refit["divergence"]["after"]["text"] < refit["divergence"]["before"]["text"]
    kept = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer, f in refit["layers"].items() if f["strength"]}
    before = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    same = {
        name for name in after if after[name].shape == before[name].shape and torch.equal(after[name], before[name])
    }
    cut = {name for name in after if after[name].shape != before[name].shape}
    assert all(".q_proj." in name or ".k_proj." in name for name in cut)
    assert set(after) - same - cut == kept
    assert kept


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_pickled_model_is_searched_and_refitted_too(cli, model, write, tmp_path, options):
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    recipe = write({"key_cache": "10%"}, refit="ridge")
    result = cli("convert", model, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate", "--json", *options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sharing"]["reused_groups"] == 3
    assert (tmp_path / "out").exists() == (not options)


def test_two_sequences_are_enough_to_calibrate(cli, base, write, tmp_path):
    recipe = write({"key_cache": "10%"}, refit="ridge", calibration={**CALIBRATION, "sequences": 2})
    result = cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == 0, result.stderr


def test_layer_by_layer_finds_plain_output_errors_and_says_what_it_took(cli, base, write, tmp_path):
    result = cli(
        "convert", base, "--recipe", write({"key_cache": "10%"}, refit="ridge"), "-o", tmp_path / "out",
        "--layer-by-layer",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "by output error" in result.stderr
    assert "peak memory" in result.stderr


def test_a_limit_on_perplexity_is_kept_and_used(cli, base, write, tmp_path):
    result = cli(
        "convert", base, "--recipe", write({"max_perplexity_increase": "5%"}), "-o", tmp_path / "out", "--json"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["savings"]["key_cache_removed"] > 0
    assert report["perplexity"]["increase"] < 0.06


def test_a_dry_run_with_a_search_shows_the_plan_and_writes_nothing(cli, base, write, tmp_path):
    result = cli(
        "convert", base, "--recipe", write({"key_cache": "10%"}), "-o", tmp_path / "out", "--dry-run", "--json"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sharing"]["reused_groups"] == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("search", "pattern"),
    [
        ({"key_cache": "90%"}, r"search\.json, line 1: 90% of the key cache .* 83\.3% at the most"),
        ({"key_cache": "0%"}, "0% leaves nothing to do"),
        ({"key_cache": "100%"}, "100% is impossible"),
        ({"max_perplexity_increase": "0%"}, "0% leaves nothing to do"),
        ({"key_cache": "10%", "max_perplexity_increase": "2%"}, "exactly one of"),
    ],
)
def test_impossible_budgets_are_refused_with_what_is_possible(cli, base, write, tmp_path, search, pattern):
    result = cli("convert", base, "--recipe", write(search), "-o", tmp_path / "out")
    refused(result, 1, pattern, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("Too short to be cut into sequences.\n", r"text\.txt.*too few for \d+ sequences of 48 tokens"),
        ("", r"text\.txt.*empty, or the tokenizer makes no token of it"),
    ],
)
def test_text_that_cannot_calibrate_is_refused(cli, base, write, tmp_path, content, pattern):
    text = tmp_path / "text.txt"
    text.write_text(content)
    result = cli(
        "convert", base, "--recipe", write({"key_cache": "10%"}), "-o", tmp_path / "out", "--calibration", text
    )
    refused(result, 1, pattern, tmp_path / "out")


def test_calibration_needs_a_sequence_to_hold_out(cli, base, write, tmp_path):
    recipe = write({"key_cache": "10%"}, calibration={**CALIBRATION, "sequences": 1})
    result = cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out")
    refused(result, 1, "at least 2 sequences", tmp_path / "out")


def test_a_model_without_a_tokenizer_is_refused(cli, model, write, tmp_path):
    for file in model.glob("*token*"):
        file.unlink()
    result = cli("convert", model, "--recipe", write({"key_cache": "10%"}), "-o", tmp_path / "out")
    refused(result, 1, "no tokenizer that can be loaded", tmp_path / "out")


@pytest.mark.parametrize("options", [(), ("--layer-by-layer",)])
def test_activations_that_are_not_finite_are_refused(cli, model, write, tmp_path, options):
    for file in sorted(model.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if "layers.3.self_attn.v_proj.weight" in name:
                tensors[name][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    result = cli("convert", model, "--recipe", write({"key_cache": "10%"}), "-o", tmp_path / "out", *options)
    refused(result, 1, "not finite on the calibration text", tmp_path / "out")


def test_a_quantised_output_projection_is_not_refitted(cli, model, write, tmp_path):
    for file in sorted(model.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if "layers.2.self_attn.o_proj.weight" in name:
                tensors[name] = tensors[name].to(torch.int8)
        save_file(tensors, file, metadata={"format": "pt"})
    result = cli("convert", model, "--recipe", write({"key_cache": "10%"}, refit="ridge"), "-o", tmp_path / "out")
    refused(result, 1, "cannot be refitted", tmp_path / "out")


def test_a_whole_layer_family_shares_whole_layers(cli, write, tmp_path):
    from support.tiny_models import save_tiny, save_tokenizer

    save_tiny("olmo2", tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    result = cli("convert", tmp_path / "base", "--recipe", write({"key_cache": "20%"}), "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = found_map(tmp_path / "out")
    assert len(found) == 2
    assert all(None not in row for row in found.values())
    shutil.rmtree(tmp_path / "out")


def test_a_search_by_the_whole_cache_is_told_before_anything_is_written(cli, tmp_path):
    base, recipe = save_reader(tmp_path / "base", 3, 2), tmp_path / "r.yaml"
    keys = "calibration: {sequences: 4, length: 32}\ntreatments: [window]\n"
    recipe.write_text(f"search: {{cache: 30%, at: 300}}\n{keys}")
    result = cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "KV groups with windows" in result.stdout
    assert not (tmp_path / "out").exists()
    recipe.write_text(f"search:\n  cache: 30%\n  at: 1000\n{keys}")
    refused(cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out"), 1, "r.yaml, line 3: the model has posit")
    recipe.write_text(f"search: {{cache: 99%, at: 300}}\n{keys}")
    refused(
        cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out"),
        1,
        "99% of the cache is more than these treatments can save .* write 7.% or less",
        tmp_path / "out",
    )
