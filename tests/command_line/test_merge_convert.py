"""`merge` from recipe to card, by the command line, and the plans that it refuses."""

import json

import pytest
from safetensors.torch import load_file

from support.tiny_models import save_tiny, save_tokenizer
from support.whole_layers import recipe_text

LAYERS = {0: "merge", 3: "{merge: {groups: 2}}"}


@pytest.fixture(scope="module")
def folders(cli, tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    save_tiny("llama", root / "base", max_shard_size="10GB")
    save_tokenizer(root / "base")
    (root / "recipe.yaml").write_text(recipe_text(LAYERS))
    done = cli("convert", root / "base", "--recipe", root / "recipe.yaml", "-o", root / "out")
    assert done.returncode == 0, done.stderr
    return root / "base", root / "out", done.stdout


def test_the_files_shrink_and_other_tensors_stay(folders):
    base, out, _ = folders
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(after) == set(before)
    ours = ("model.layers.0.self_attn.", "model.layers.3.self_attn.")
    for name, tensor in after.items():
        if not name.startswith(ours):
            assert tensor.equal(before[name]), name
    for layer, left in ((0, 1), (3, 2)):
        for side in ("k", "v"):
            start = f"model.layers.{layer}.self_attn.{side}_proj"
            assert after[f"{start}.weight"].shape == (16 * left, 64)
            assert after[f"{start}.bias"].shape == (16 * left,)
        assert not after[f"model.layers.{layer}.self_attn.q_proj.weight"].equal(
            before[f"model.layers.{layer}.self_attn.q_proj.weight"]
        )
    # 3 of 4, and 2 of 4, rows of keys and of values, with their biases.
    saved = sum(path.stat().st_size for path in base.glob("*.safetensors")) - (out / "model.safetensors").stat().st_size
    assert saved == pytest.approx(2 * (3 + 2) * 16 * 65 * 4, abs=1000)


def test_configuration_recipe_and_code_tell_of_merged_layers(folders):
    _, out, _ = folders
    config = json.loads((out / "config.json").read_text())["shared_attention"]
    assert config["layers"] == {
        "0": {str(group): {"merge": {"groups": 1}} for group in range(4)},
        "3": {str(group): {"merge": {"groups": 2}} for group in range(4)},
    }
    assert "plan:\n  0: merge\n  3: {merge: {groups: 2}}\n" in (out / "recipe.yaml").read_text()
    assert (out / "shared_attention_merge.py").is_file()


def test_the_written_recipe_gives_the_same_merged_folder(folders, cli, tmp_path):
    base, out, _ = folders
    done = cli("convert", base, "--recipe", out / "recipe.yaml", "-o", tmp_path / "again", "--no-validate")
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json", "recipe.yaml", "shared_attention_merge.py"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_report_card_and_terminal_tell_of_merged_layers(folders):
    _, out, shown = folders
    report = json.loads((out / "report.json").read_text())
    assert report["treatments"] == {"merge": {"groups": 8}}
    # Measured on a real cache: 1 + 2 of 8 KV groups are left in two of six layers.
    cache = report["savings"]["cache_bytes_per_token"]
    assert cache == {"before": 24 * 2 * 16 * 4, "after": (24 - 5) * 2 * 16 * 4}
    assert report["savings"]["key_cache_removed"] == pytest.approx(5 / 24, abs=1e-6)
    assert report["decode_check"]["same_greedy_tokens"]
    assert "Merge            2 of 6 layers have fewer KV groups: 0 (1 of 4); 3 (2 of 4)\n" in shown
    card = (out / "README.md").read_text()
    assert "converted so that 2 of 6 layers have fewer KV groups, which more query heads read." in card
    assert "| 3 | 4 | 2 |" in card


def test_inspect_audit_and_dry_run_tell_of_merged_layers(folders, cli):
    base, out, _ = folders
    told = cli("inspect", out).stdout
    assert "Layers with fewer KV groups  0 (1 of 4); 3 (2 of 4)\n" in told
    assert "2,432 bytes" in told
    audited = cli("audit", out)
    assert audited.returncode == 0, audited.stderr + audited.stdout
    dry = cli("convert", base, "--recipe", out / "recipe.yaml", "-o", out.parent / "dry", "--dry-run").stdout
    assert "layers with fewer KV groups  0 (1 of 4); 3 (2 of 4)\n" in dry
    assert "3.1 kB -> 2.4 kB (-20.8%)" in dry


def test_a_merged_folder_is_healed(folders, cli, tmp_path):
    base, out, _ = folders
    options = ("--tokens", "4k", "--length", 64, "--no-validate", "--device", "cpu")
    done = cli("heal", out, "-o", tmp_path / "healed", "--against", base, *options)
    assert done.returncode in (0, 3), done.stderr
    if done.returncode == 3:
        assert "Healing was refused" in done.stderr
        return
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "healed" / "model.safetensors")
    changed = {name for name in before if not after[name].equal(before[name])}
    sides = [f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in (0, 3) for side in "vo"]
    assert changed >= set(sides)
    assert {name.rpartition(".")[0] for name in changed} == {name.rpartition(".")[0] for name in sides}


ONE = "{merge: {groups: 1}}"
BOTH = f"{{0: {{merge: {{groups: 1}}, window: {{sinks: 2, tokens: 8}}}}, 1: {ONE}, 2: {ONE}, 3: {ONE}}}"


@pytest.mark.parametrize(
    ("model_type", "plan", "message"),
    [
        ("llama", "{0: {merge: {groups: 3}}}", "Layer 0 has 4 KV groups, which merge cannot make 3; write 1 or 2."),
        ("llama", "{0: {merge: {groups: 4}}}", "Layer 0 has 4 KV groups, which merge cannot make 4; write 1 or 2."),
        ("llama", "{0: {merge: {groups: 0}}}", "line 1: layer 0: groups is a whole number from 1, not 0"),
        ("llama", "{0: {merge: {heads: 1}}}", "line 1: layer 0: merge takes the number of KV groups that are left"),
        ("llama", "{0: {drop: {all: 1}}}", "line 1: layer 0: drop has no arguments for a whole layer"),
        ("llama", "{0: {merg: {groups: 1}}}", "there is no treatment 'merg'; did you mean 'merge'?"),
        ("llama", "{0: {1: {merge: {groups: 1}}}}", "Layer 0: merge is done to whole layers; write 0: merge in the"),
        (
            "llama",
            f"{{0: {BOTH}}}",
            "Layer 0 cannot be treated by merge and window together; choose one of them.",
        ),
        ("llama", "{1: merge, 3: {0: {share: [[1, 0], null]}}}", "Layer 1 KV group 0 lends its scores to layer 3"),
        ("llama", "{6: merge}", "there is no layer '6'; the model has layers 0 to 5"),
        ("qwen3", "{1: merge}", "Layer 1 cannot have fewer KV groups: its queries or keys are normalised after"),
        ("gpt2", "{1: merge}", "its keys do not turn by position; low_rank makes such keys and values smaller."),
        ("bert", "{1: merge}", "Layer 1 cannot have fewer KV groups: it caches nothing"),
        ("bart", "{decoder.cross.1: merge}", "Layer decoder.cross.1 cannot have fewer KV groups"),
        ("phi3", "{1: merge}", "its queries, keys and values come from one projection"),
    ],
)
def test_what_cannot_be_merged_is_one_line(cli, tmp_path, model_type, plan, message):
    save_tiny(model_type, tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(f"plan: {plan}\n")
    done = cli("convert", tmp_path / "base", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--dry-run")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_one_kv_group_cannot_become_fewer(cli, tmp_path):
    save_tiny("llama", tmp_path / "base", num_key_value_heads=1)
    (tmp_path / "recipe.yaml").write_text("plan: {1: merge}\n")
    done = cli("convert", tmp_path / "base", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--dry-run")
    assert "Layer 1 cannot have fewer KV groups: it has one KV group only." in done.stderr
