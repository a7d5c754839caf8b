"""`drop` from recipe to card, by the command line, and the plans that it refuses."""

import json

import pytest
from safetensors.torch import load_file

from support.tiny_models import save_tiny, save_tokenizer
from support.whole_layers import recipe_text

LAYERS = {0: "drop", 3: "drop"}


@pytest.fixture(scope="module")
def folders(cli, tmp_path_factory):
    root = tmp_path_factory.mktemp("drop")
    save_tiny("llama", root / "base", max_shard_size="10GB")
    save_tokenizer(root / "base")
    (root / "recipe.yaml").write_text(recipe_text(LAYERS))
    done = cli("convert", root / "base", "--recipe", root / "recipe.yaml", "-o", root / "out")
    assert done.returncode == 0, done.stderr
    return root / "base", root / "out", done.stdout


def test_all_tensors_of_the_attention_leave_the_files(folders):
    base, out, _ = folders
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    gone = {name for name in before if name.startswith(("model.layers.0.self_attn.", "model.layers.3.self_attn."))}
    assert len(gone) == 16
    assert set(after) == set(before) - gone
    assert all(after[name].equal(before[name]) for name in after)


def test_configuration_recipe_and_code_say_so(folders):
    _, out, _ = folders
    config = json.loads((out / "config.json").read_text())["shared_attention"]
    assert config["layers"] == {"0": "drop", "3": "drop"}
    assert "plan:\n  0: drop\n  3: drop\n" in (out / "recipe.yaml").read_text()
    assert (out / "shared_attention_drop.py").is_file()


def test_the_written_recipe_gives_the_same_folder(folders, cli, tmp_path):
    base, out, _ = folders
    done = cli("convert", base, "--recipe", out / "recipe.yaml", "-o", tmp_path / "again", "--no-validate")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json", "recipe.yaml", "shared_attention_drop.py"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_report_card_and_terminal_tell_it(folders):
    _, out, shown = folders
    report = json.loads((out / "report.json").read_text())
    assert report["treatments"] == {"drop": {"layers": 2}}
    # Measured on a real cache: two of six layers cache nothing.
    cache = report["savings"]["cache_bytes_per_token"]
    assert cache == {"before": 6 * 2 * 4 * 16 * 4, "after": 4 * 2 * 4 * 16 * 4}
    assert report["savings"]["key_cache_removed"] == pytest.approx(2 / 6, abs=1e-6)
    assert report["decode_check"]["same_greedy_tokens"]
    assert "Drop             2 of 6 layers have no attention: 0, 3\n" in shown
    card = (out / "README.md").read_text()
    assert "converted so that 2 of 6 layers have no attention." in card
    assert "| 0, 3 | no attention at all |" in card


def test_inspect_and_dry_run_tell_it(folders, cli):
    base, out, _ = folders
    told = cli("inspect", out).stdout
    assert "Layers that have no attention  0, 3\n" in told
    assert "Shares already" not in told
    assert "2,048 bytes" in told
    dry = cli("convert", base, "--recipe", out / "recipe.yaml", "-o", out.parent / "dry", "--dry-run").stdout
    assert "layers that have no attention  0, 3\n" in dry
    assert "16 dropped, 0 sliced" in dry
    assert "3.1 kB -> 2.0 kB (-33.3%)" in dry


@pytest.mark.parametrize(
    ("model_type", "plan", "message"),
    [
        ("llama", "{0: {1: {drop: true}}}", "line 1: layer 0 KV group 1: drop is done to whole layers: write it in"),
        ("llama", "{0: drop, 1: drop, 2: drop, 3: drop, 4: drop, 5: drop}", "would leave no layer with attention"),
        (
            "llama",
            "{1: drop, 3: {0: {share: [[1, 0], null]}}}",
            "Layer 1 KV group 0 lends its scores to layer 3",
        ),
        ("bert", "{1: drop}", "in models of type 'bert' the output projection lies outside of the attention"),
        ("llama", "{6: drop}", "there is no layer '6'; the model has layers 0 to 5"),
    ],
)
def test_what_cannot_be_is_refused(cli, tmp_path, model_type, plan, message):
    save_tiny(model_type, tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(f"plan: {plan}\n")
    done = cli("convert", tmp_path / "base", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--dry-run")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
