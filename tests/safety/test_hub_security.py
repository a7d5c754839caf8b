"""What a hostile model cannot do: run code, or make files be read or written outside of its folder."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sa_convert.console.redaction import redact
from sa_convert.errors import CheckpointError
from sa_convert.read.folder import open_folder
from support.cli_cases import edit_json, refused
from support.loopback_hub import LoopbackHub
from support.make_checkpoint import tiny_llama
from support.processes import ROOT, run_cli

QUICK = ("--recipe", "late-span", "--no-validate")
SMALL = ("--sequences", 2, "--length", 64)


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        yield server
        assert server.unanswered == []


@pytest.fixture
def run(hub, tmp_path):
    def run(*arguments, **changes):
        return run_cli(*arguments, env={**hub.environment(tmp_path / "home"), **changes}, cwd=tmp_path)

    return run


def plant(base, folder, marker, kind):
    """A model with code that leaves a file at `marker` when it is imported. kind: whose code that is."""
    shutil.copytree(base, folder)
    (folder / "helper_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nMARK = 1\n")
    code = "from transformers import {0}\nfrom .helper_own import MARK\nclass Own({0}):\n    {1}\n"
    if kind == "tokenizer":
        (folder / "tokenization_own.py").write_text(code.format("PreTrainedTokenizerFast", "pass"))
        named = {"AutoTokenizer": [None, "tokenization_own.Own"]}
        edit_json(folder / "tokenizer_config.json", auto_map=named, tokenizer_class="Own")
        return folder
    (folder / "configuration_own.py").write_text(code.format("LlamaConfig", "model_type = 'own'"))
    (folder / "modeling_own.py").write_text(code.format("LlamaForCausalLM", "config_class = None"))
    named = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_json(folder / "config.json", auto_map=named, **({"model_type": "own"} if kind == "type" else {}))
    return folder


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_code_of_a_model_is_not_run_unasked(hub, run, base, tmp_path, place):
    marker = tmp_path / "ran"
    for kind in ("type", "model", "tokenizer"):
        folder = plant(base, tmp_path / kind, marker, kind)
        hub.add_repo(f"org/{kind}", folder)
        model = folder if place == "folder" else f"org/{kind}"
        out = tmp_path / "out"
        inspected = run("inspect", model)
        assert inspected.returncode == 0, inspected.stderr
        convert = run("convert", model, *QUICK, "-o", out)
        analyze = run("analyze", model, "-o", out, *SMALL)
        if kind == "type":
            assert "modeling code is not part of transformers" in inspected.stdout
            refused(convert, 1, "type 'own' are not supported: its modeling code is not part of transformers", out)
            refused(analyze, 1, "type 'own' are not supported", out)
            refused(run("evaluate", model, *SMALL), 1, "does not know this type .* --trust-remote-code")
        else:
            named = "config.json" if kind == "model" else "tokenizer_config.json"
            pattern = f"{kind}: {named} names code of the model's own .* --trust-remote-code"
            refused(convert, 1, pattern, out)
            refused(analyze, 1, pattern, out)
        if kind == "tokenizer":
            refused(run("evaluate", model, *SMALL), 1, "no tokenizer that can be loaded")
        if kind == "model":  # by the code of transformers
            assert run("evaluate", model, *SMALL).returncode == 0
        assert not marker.exists()
    cached = [path.suffix for path in (tmp_path / "home").rglob("*")]
    assert ".py" not in cached


def test_trusted_code_is_named_pinned_and_of_this_revision(hub, run, base, recipe, tmp_path):
    marker, later = tmp_path / "ran", tmp_path / "later"
    folder = plant(base, tmp_path / "tokenizer", marker, "tokenizer")
    commit = hub.add_repo("org/own", folder)
    (folder / "helper_own.py").write_text(f"open({str(later)!r}, 'w').close()\nMARK = 1\n")
    hub.add_revision("org/own", folder, "main")
    result = run("convert", f"org/own@{commit}", "--recipe", recipe, "-o", "out", "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    told = f"trusting the code of org/own at {commit}: helper_own.py, tokenization_own.py"
    assert told in result.stderr
    assert result.stderr.index(told) < result.stderr.index("validating")
    assert marker.exists()
    assert not later.exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    code = ["helper_own.py", "tokenization_own.py"]
    assert report["base_model"] == {"id": "org/own", "revision": commit, "code": code}
    # The tokenizer works in the new folder, whose code is then not only ours.
    assert all((tmp_path / "out" / name).exists() for name in code)
    marker.unlink()
    refused(run("evaluate", "out", *SMALL), 1, "its code helper_own.py is not what this version of sa-convert writes")
    assert not marker.exists()
    assert run("evaluate", "out", *SMALL, "--trust-remote-code").returncode == 0
    assert marker.exists()
    marker.unlink()
    result = run("evaluate", f"org/own@{commit}", *SMALL, "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert told in result.stderr
    assert marker.exists()
    assert not later.exists()
    result = run("analyze", f"org/own@{commit}", "-o", "analysis", *SMALL, "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text())["base_model"]["revision"] == commit


def test_models_with_a_family_run_by_transformers_even_when_their_code_is_trusted(hub, run, base, recipe, tmp_path):
    marker = tmp_path / "ran"
    hub.add_repo("org/own", plant(base, tmp_path / "model", marker, "model"))
    result = run("convert", "org/own", "--recipe", recipe, "-o", "out", "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert "configuration_own.py, helper_own.py, modeling_own.py" in result.stderr
    assert not marker.exists()
    assert not list((tmp_path / "out").glob("*own*"))


def test_code_of_other_repositories_is_never_run(hub, run, base, tmp_path):
    folder = plant(base, tmp_path / "model", tmp_path / "ran", "tokenizer")
    hub.add_repo("org/other", folder)
    for reference, pattern in (
        ("org/other--tokenization_own.Own", "code of another repository .'org/other--tokenization_own.Own'"),
        ("absent.Own", "names code that the model lacks .'absent.Own'"),
        ("../elsewhere.Own", "names code that the model lacks"),
    ):
        edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, reference]})
        for command in (("convert", folder, *QUICK, "-o", "out"), ("evaluate", folder, *SMALL)):
            refused(run(*command, "--trust-remote-code"), 1, pattern)
    assert not (tmp_path / "ran").exists()


def test_names_that_lead_out_of_the_folder(hub, run, tmp_path):
    files = {path.name: path.read_bytes() for path in tiny_llama(tmp_path / "m", 2).iterdir()}
    index = json.loads(files["model.safetensors.index.json"])
    tensor = next(iter(index["weight_map"]))
    for number, name in enumerate(("../out.safetensors", "/tmp/out.safetensors", "..\\out.safetensors", "a/../../b")):
        index["weight_map"][tensor] = name
        changed = {**files, "model.safetensors.index.json": json.dumps(index).encode()}
        hub.add_repo(f"org/index{number}", changed)
        pattern = "outside of the model's folder; do not trust this model"
        refused(run("inspect", f"org/index{number}"), 1, pattern)
        refused(run("convert", f"org/index{number}", *QUICK, "-o", tmp_path / "out"), 1, pattern, tmp_path / "out")
        hub.add_repo(f"org/list{number}", {**files, name: b"planted"})
        refused(run("inspect", f"org/list{number}"), 1, "would lie outside of its folder; do not trust it")
        refused(run("convert", f"org/list{number}", *QUICK, "-o", tmp_path / "out"), 1, "do not trust it")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"planted"]
    refused(run("inspect", "org/m@../../x"), 1, "there is no such folder or file")


def test_a_pickle_on_the_hub_runs_nothing(hub, run, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    folder = tiny_llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    hub.add_repo("org/evil", folder)
    assert run("inspect", "org/evil").returncode == 0
    result = run("convert", "org/evil", *QUICK, "-o", tmp_path / "out")
    refused(result, 1, "holds more than weights, and loading the rest could run code", tmp_path / "out")
    refused(run("evaluate", "org/evil", *SMALL), 1, "could run code, so it is not loaded")
    assert not marker.exists()


def test_links_out_of_a_cloned_folder(tmp_path):
    """Code, side files and the card; test_read_folder.py has the others."""
    (tmp_path / "secret.py").write_text("")
    for name in ("own.py", "vocab.json"):
        folder = tiny_llama(tmp_path / name.replace(".", "_"))
        (folder / name).symlink_to(tmp_path / "secret.py")
        with pytest.raises(CheckpointError, match="is a link that leads out of the model's folder"):
            open_folder(folder)
    folder = tiny_llama(tmp_path / "card")
    (tmp_path / "card.md").write_text("---\nlicense: secret\n---\n")
    (folder / "README.md").symlink_to(tmp_path / "card.md")
    result = run_cli("convert", folder, *QUICK, "-o", tmp_path / "out")
    refused(result, 1, "README.md: the model card is a link that leads out", tmp_path / "out")


def test_blobs_that_models_of_a_cache_share(tmp_path):
    """huggingface_hub may keep one file for equal blobs of several models."""
    plain = tiny_llama(tmp_path / "plain")
    home = tmp_path / "cache" / "models--org--name"
    snapshot = home / "snapshots" / ("0" * 40)
    shared = tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)
    for folder in (snapshot, home / "blobs", shared.parent):
        folder.mkdir(parents=True)
    (plain / "model.safetensors").rename(shared)
    (home / "blobs" / "1").symlink_to(f"../../blobs/ab/{shared.name}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (plain / "config.json").rename(snapshot / "config.json")
    assert len(open_folder(snapshot).tensors) == 39
    # Not by a link that huggingface_hub does not make, nor to anywhere else.
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(shared)
    with pytest.raises(CheckpointError, match="leads out"):
        open_folder(snapshot)
    shared.rename(tmp_path / "elsewhere")
    (home / "blobs" / "1").unlink()
    (home / "blobs" / "1").symlink_to(tmp_path / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    with pytest.raises(CheckpointError, match="leads out"):
        open_folder(snapshot)


def test_headers_that_lie_are_not_fetched(hub, run, tmp_path):
    config = (tiny_llama(tmp_path / "m") / "config.json").read_bytes()
    hub.add_repo("org/lie", {"config.json": config})
    hub.virtual_file("org/lie", "model.safetensors", (2**40).to_bytes(8, "little"), 2**41)
    refused(run("inspect", "org/lie"), 1, "says its header has 1099511627776 bytes, more than any")
    hub.virtual_file("org/lie", "model.safetensors", (10**6).to_bytes(8, "little"), 10**5)
    refused(run("inspect", "org/lie"), 1, "says its header has 1000000 bytes, but is 100000 bytes long")
    assert hub.bytes_sent < 200_000


def test_a_server_without_ranges_does_not_make_us_download_the_file(tmp_path):
    """Some mirrors answer with all of the file."""
    data = (tiny_llama(tmp_path / "m") / "model.safetensors").read_bytes()
    sent = []

    class Whole(BaseHTTPRequestHandler):
        def do_GET(self):
            if "/resolve/" not in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + 10**9))
            self.end_headers()
            try:
                for piece in (data, *[bytes(10**5)] * 10**4):
                    self.wfile.write(piece)
                    sent.append(len(piece))
            except OSError:
                pass

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Whole)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "import sys; from pathlib import Path; from sa_convert.read.hub_headers import remote_shards; "
        "from sa_convert.read.hub_names import HubName; "
        "remote_shards(HubName('org/m', '0' * 40), Path('x'), {'model.safetensors': 100})"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    server.shutdown()
    assert (
        "1000000000 bytes after tensor 'lm_head.weight' belong to no tensor" in result.stderr
    )  # the header was read, in parts
    assert sum(sent) < 10**8


def test_redaction(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "some-secret-token")
    text = "at http://me:pass@host/x with some-secret-token, hf_abcdefghijklmnopqrst, Authorization: Bearer abc.def"
    assert redact(text) == "at http://***@host/x with ***, hf_***, Authorization: Bearer ***"
    assert redact("hf_hub_download of org/name@main at https://huggingface.co/org/name") == (
        "hf_hub_download of org/name@main at https://huggingface.co/org/name"
    )
