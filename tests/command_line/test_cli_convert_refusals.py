"""`sa-convert convert` as a process: what it refuses, and what it leaves behind when it fails."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
from safetensors import safe_open

from support.cli_cases import digests, refused
from support.make_checkpoint import llama_config, llama_tensors, write_model
from support.processes import ROOT, run_cli
from support.tiny_models import load_converted, save_tiny, write_recipe


def test_the_gate_refuses(base, recipe, tmp_path):
    out = tmp_path / "out"
    result = run_cli("convert", base, "--recipe", recipe, "-o", out, "--max-perplexity-increase", "0%")
    # A random model may by chance get better; then a limit of 0% lets it pass, and the test would show nothing.
    refused(result, 3, r"perplexity rises by \d+\.\d+% \(limit 0%\).*--max-perplexity-increase", out)


def test_nan_weights_are_refused(model, recipe, tmp_path):
    file = next(file for file in model.glob("*.safetensors") if "model.norm.weight" in safe_open(file, "np").keys())  # noqa: SIM118
    with open(file, "r+b") as shard:
        size = struct.unpack("<Q", shard.read(8))[0]
        start, _ = json.loads(shard.read(size))["model.norm.weight"]["data_offsets"]
        shard.seek(8 + size + start)
        shard.write(b"\xff\xff\xff\x7f")
    result = run_cli("convert", model, "--recipe", recipe, "-o", tmp_path / "out")
    refused(result, 3, r"perplexity is not finite", tmp_path / "out")


# What is wrong with the model: a function that damages the folder, and what the line says.
def _remove(pattern):
    def damage(folder):
        for file in folder.glob(pattern):
            file.unlink()

    return damage


def _config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))

    return damage


def _truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 100)


def _lie(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])


def _index(change):
    def damage(folder):
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        name = next(iter(index["weight_map"]))
        index["weight_map"][name] = change
        file.write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (shutil.rmtree, r"model.*(does not exist|no such|there is no)"),
        (_remove("*"), r"model: is an empty folder"),
        (_remove("*.safetensors*"), r"weights"),
        (_remove("config.json"), r"config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json.*JSON"),
        (_truncate, r"model-00002.*safetensors"),
        (_lie, r"model-00002.*header"),
        (_remove("model-00002*"), r"model-00002-of-\d+\.safetensors.*(missing|absent|not there|does not exist)"),
        (_index("../../outside.safetensors"), r"outside"),
        (_config(model_type="frobnicator"), r"'frobnicator' are not supported.*llama"),
        (_config(model_type="remove"), r"model_type"),
        (_config(model_type="shared_attention_llama"), r"shares attention already"),
        (_config(model_type="gpt_neo"), r"'gpt_neo' are not supported: its attention is computed by code of its own"),
        (_config(num_attention_heads=7), r"num_attention_heads.* 7"),
        (_config(num_hidden_layers=9), r"model\.layers\.6\.self_attn\.q_proj\.weight.*9 layers"),
        (_config(architectures=["LlamaForSequenceClassification"]), r"LlamaForSequenceClassification"),
    ],
    ids=[
        "missing folder",
        "empty folder",
        "no weights",
        "no config",
        "broken config",
        "truncated",
        "lying header",
        "index names absent file",
        "index leads outside",
        "unknown type",
        "no type",
        "converted already",
        "attention code of its own",
        "heads contradict",
        "layers contradict",
        "other architecture",
    ],
)
def test_bad_models(model, recipe, tmp_path, damage, pattern):
    damage(model)
    result = run_cli("convert", model, "--recipe", recipe, "-o", tmp_path / "out")
    refused(result, 1, pattern, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("sharing: {spans: [{layers: 9}]}", r"recipe\.yaml, line 1.* 9"),
        ("sharing: {map: {2: [[4, 0], null, null, null, null, null, null, null]}}", r"2.*(earlier|before)"),
        ("sharing: {map: {2: [[0, 0]]}}", r"Layer 2 lists 1 heads.* 8 query heads"),
        ("sharing: {map: {2: [[0, 9], null, null, null, null, null, null, null]}}", r"layer 0 has heads 0 to 7"),
        ("sharing: {span: []}", r"recipe\.yaml, line 1: unknown key 'span'.*'spans'"),
        ("sharing: [", r"recipe\.yaml, line"),
        ("", r"recipe\.yaml is empty"),
    ],
)
def test_bad_recipes(base, tmp_path, text, pattern):
    (tmp_path / "recipe.yaml").write_text(text)
    result = run_cli("convert", base, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    refused(result, 1, pattern, tmp_path / "out")


def test_unreadable_recipes(base, tmp_path):
    refused(run_cli("convert", base, "--recipe", "no-such-recipe", "-o", tmp_path / "out"), 1, "no-such-recipe")
    refused(run_cli("convert", base, "--recipe", tmp_path / "x.yaml", "-o", tmp_path / "out"), 1, r"x\.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused(run_cli("convert", base, "--recipe", tmp_path / "binary.yaml", "-o", tmp_path / "out"), 1, "binary")


def test_mixed_attention_types(tmp_path):
    save_tiny("gemma2", tmp_path / "gemma2")
    recipe = write_recipe(tmp_path / "recipe.json", {1: [[0, head] for head in range(8)]})
    result = run_cli("convert", tmp_path / "gemma2", "--recipe", recipe, "-o", tmp_path / "out")
    refused(result, 1, "Layer 1 head 0 .*sliding_attention, the borrowing layer full_attention", tmp_path / "out")


def test_wrong_usage_is_status_2(base):
    assert run_cli("convert", base).returncode == 2
    assert (
        run_cli("convert", base, "--recipe", "late-span", "-o", "x", "--max-perplexity-increase", "lots").returncode
        == 2
    )


def test_existing_output_stays(base, recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        result = run_cli("convert", base, "--recipe", recipe, "-o", out, "--no-validate", *options)
        refused(result, 1, str(out))
        assert digests(out).keys() == {"precious.txt"}
    # Its own output is replaced, when asked.
    ours = tmp_path / "ours"
    for options, status in (([], 0), ([], 1), (["--overwrite"], 0)):
        result = run_cli("convert", base, "--recipe", recipe, "-o", ours, "--no-validate", *options)
        assert result.returncode == status, result.stderr
    load_converted(ours)


def test_a_refused_overwrite_keeps_the_old_result(base, recipe, tmp_path):
    out = tmp_path / "out"
    assert run_cli("convert", base, "--recipe", recipe, "-o", out, "--no-validate").returncode == 0
    before = digests(out)
    options = ["--overwrite", "--max-perplexity-increase", "0%"]
    assert run_cli("convert", base, "--recipe", recipe, "-o", out, *options).returncode == 3
    assert digests(out) == before


def test_no_disk_space(base, recipe, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = run_cli("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate", preexec_fn=limit)
    refused(result, 1, r"cannot be written", tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_in_the_middle(recipe, tmp_path, number):
    """While weights are written. A killed run cleans up at the next."""
    model, out = tmp_path / "model", tmp_path / "out"
    config = llama_config(layers=24, hidden=2048, heads=16, groups=16, intermediate=5632, vocabulary=32000)
    write_model(model, config, llama_tensors(config), shards=8, sparse=True)  # 2.7 GB
    command = [
        sys.executable,
        "-m",
        "sa_convert",
        "convert",
        model,
        "--recipe",
        "late-span",
        "-o",
        out,
        "--no-validate",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.stat().st_size for path in tmp_path.glob(".out*/**/*.safetensors") if path.exists()):
            break
        time.sleep(0.002)
    assert process.poll() is None, "finished before it could be interrupted"
    process.send_signal(number)
    stderr = process.communicate()[1]
    assert not out.exists()
    if number != signal.SIGKILL:
        assert process.returncode != 0
        assert "Traceback" not in stderr
        assert not list(tmp_path.glob(".out*"))
    if number == signal.SIGINT:
        assert process.returncode == 1
        assert stderr.replace("\r", "\n").strip().splitlines()[-1] == "Error: Interrupted; nothing was written."
    again = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (out / "report.json").exists()
    assert not list(tmp_path.glob(".out*"))
