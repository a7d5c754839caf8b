"""`sa-convert convert` as a process: what it writes."""

import hashlib
import json
import os
import shutil

import pytest
from safetensors import safe_open

from support.cli_cases import SPAN, digests
from support.processes import ROOT, run_cli
from support.tiny_models import load_converted


def test_converts_and_validates(base, recipe, tmp_path):
    out = tmp_path / "out"
    result = run_cli("convert", base, "--recipe", recipe, "-o", out, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text())
    assert "%|" in result.stderr  # progress
    assert report["family"] == "llama"
    assert report["sharing"] == {"layers": {"3": SPAN[3]}, "reused_groups": 4, "total_groups": 24}
    assert report["perplexity"]["tokens"] > 1000
    increase = report["perplexity"]["after"] / report["perplexity"]["before"] - 1
    assert report["perplexity"]["increase"] == pytest.approx(increase, abs=1e-4)
    assert report["decode_check"]["same_greedy_tokens"] is True
    assert report["gate"] == {"max_perplexity_increase": 0.6, "passed": True}
    sizes = {key: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for key, folder in
             (("before", base), ("after", out))}  # fmt: skip
    assert report["savings"]["checkpoint_bytes"] == sizes
    # 6 layers x 4 groups x (key + value) x 16 x 4 bytes; 4 keys fewer.
    assert report["savings"]["cache_bytes_per_token"] == {"before": 3072, "after": 3072 - 4 * 64}
    assert report["savings"]["key_cache_removed"] == pytest.approx(4 / 24, abs=1e-6)
    model = load_converted(out)
    assert model.num_parameters() == report["savings"]["parameters"]["after"]
    expected = {
        "LICENSE", "README.md", "chat_template.jinja", "config.json", "figures/sharing.png", "generation_config.json",
        "recipe.yaml", "report.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json",
        "configuration_shared_attention.py", "modeling_shared_attention.py", "shared_attention_share.py",
    }  # fmt: skip
    assert expected == {name for name in digests(out) if not name.endswith(".safetensors")}
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_kept_tensors_are_the_same_bytes(base, recipe, tmp_path):
    out = tmp_path / "out"
    assert run_cli("convert", base, "--recipe", recipe, "-o", out, "--no-validate").returncode == 0

    def hashes(folder):
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "np") as shard:
                for name in shard.keys():  # noqa: SIM118
                    data = shard.get_tensor(name)
                    found[name] = file.name, str(data.dtype), data.shape, hashlib.sha256(data.tobytes()).hexdigest()
        return found

    before, after = hashes(base), hashes(out)
    gone = {f"model.layers.3.self_attn.{side}_proj.{kind}" for side in "qk" for kind in ("weight", "bias")}
    assert set(before) - set(after) == gone
    assert all(after[name] == before[name] for name in after)


def test_its_recipe_gives_the_same_folder_again(base, recipe, tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    assert run_cli("convert", base, "--recipe", recipe, "-o", once).returncode == 0
    assert run_cli("convert", base, "--recipe", once / "recipe.yaml", "-o", again).returncode == 0
    first, second = digests(once), digests(again)
    # The report and the card name the recipe that was asked for.
    different = {name for name in first if first[name] != second.get(name)}
    assert set(first) == set(second)
    assert different <= {"report.json"}
    reports = [json.loads((folder / "report.json").read_text()) for folder in (once, again)]
    assert [report.pop("recipe") for report in reports] == ["span.json", "recipe.yaml"]
    assert reports[0] == reports[1]


def test_no_validation_measures_nothing(base, recipe, tmp_path):
    result = run_cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate", "--json")
    report = json.loads(result.stdout)
    assert report["perplexity"] is report["decode_check"] is report["gate"] is None
    assert report["savings"]["cache_bytes_per_token"] == {"before": 3072, "after": 3072 - 4 * 64}
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()


def test_dry_run_writes_nothing(base, recipe, tmp_path):
    before = set(tmp_path.iterdir())
    result = run_cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run")
    assert result.returncode == 0
    assert "4 of 24" in result.stdout
    assert "nothing was written" in result.stdout
    shown = json.loads(
        run_cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run", "--json").stdout
    )
    assert shown["sharing"]["layers"] == {"3": SPAN[3]}
    assert shown["savings"]["parameters"]["before"] > shown["savings"]["parameters"]["after"]
    assert set(tmp_path.iterdir()) == before


def test_header_only_paths_load_no_torch(base, recipe, tmp_path):
    """--dry-run and --no-validate run where torch and transformers cannot even be imported."""
    blocker = tmp_path / "blocked"
    blocker.mkdir()
    for name in ("torch", "transformers"):
        (blocker / f"{name}.py").write_text("raise RuntimeError('imported')")
    environment = {"PYTHONPATH": f"{blocker}{os.pathsep}{ROOT}"}
    for option in ("--dry-run", "--no-validate"):
        result = run_cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", option, env=environment)
        assert result.returncode == 0, result.stderr


def test_legacy_bin(base, recipe, tmp_path):
    """A pickled checkpoint is converted and validated as its safetensors twin."""
    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {name: value for file in base.glob("*.safetensors") for name, value in load_file(file).items()}
    torch.save(state, pickled / "pytorch_model.bin")
    reports = []
    for model, out in ((base, tmp_path / "a"), (pickled, tmp_path / "b")):
        result = run_cli("convert", model, "--recipe", recipe, "-o", out, "--json")
        assert result.returncode == 0, result.stderr
        reports.append(json.loads(result.stdout))
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    assert reports[0]["savings"]["parameters"] == reports[1]["savings"]["parameters"]
    assert sorted(path.name for path in pickled.iterdir() if "model" in path.name) == ["pytorch_model.bin"]
    first, second = load_converted(tmp_path / "a"), load_converted(tmp_path / "b")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_options_are_those_of_the_contract():
    shown = run_cli("convert", "--help").stdout
    options = (
        "--recipe --output --dry-run --calibration --max-perplexity-increase --no-validate --overwrite --dtype --device"
        " --json"
    )
    assert all(option in shown for option in options.split())
