"""Models on the Hub as input, against a Hub on the loopback interface."""

import json
import shutil
import time
from pathlib import Path

import pytest

from support.cli_cases import digests, edit_json, refused
from support.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub, safetensors_head
from support.make_checkpoint import llama_config, llama_tensors, tiny_llama
from support.processes import run_cli
from support.tiny_models import save_tokenizer

GB = 10**9
QUICK = ("--recipe", "late-span", "--no-validate")
UNNEEDED = {
    "pytorch_model.bin": b"not a pickle",
    "original/consolidated.00.pth": b"x",
    "onnx/model.onnx": b"x",
    "openvino_model.xml": b"x",
    "consolidated.safetensors": b"x",
    "model.gguf": b"x",
    "tf_model.h5": b"x",
    "flax_model.msgpack": b"x",
    "training_args.bin": b"x",
    "convert.py": b"x",
    ".gitattributes": b"x",
}


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        yield server
        assert server.unanswered == []


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with three shards, a tokenizer and a card."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama") / "tiny", 3)
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\nA card.\n")
    (folder / "LICENSE").write_text("the licence")
    return folder


@pytest.fixture
def run(hub, tmp_path):
    """The command line as a process that uses this Hub, its cache and working directory in tmp_path."""

    def run(*arguments, token=None, **changes):
        return run_cli(*arguments, env={**hub.environment(tmp_path / "home", token), **changes}, cwd=tmp_path)

    return run


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weight_bytes(hub):
    """Bytes of safetensors and .bin files that the Hub has sent."""
    return sum(record.bytes_sent for record in hub.requests if "/cdn/" in record.path)


def snapshot(tmp_path, repo, commit):
    return tmp_path / "home" / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit


def succeeded(result):
    assert result.returncode == 0, result.stderr
    return result


def big_model(hub):
    """405 billion parameters in one byte each. Returns bytes of the headers, the config and the index."""
    config = llama_config(126, 16384, 128, 8, 53248, 128256)
    shards: list[dict] = [{}]
    for name, fake in llama_tensors(config, "F8_E4M3").items():
        if sum(size for *_, size in shards[-1].values()) + fake.bytes > 3.5 * GB:
            shards.append({})
        shards[-1][name] = (fake.dtype, fake.shape, fake.bytes)
    names = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    index = {"weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add_repo("org/big", files)
    heads = total = 0
    for name, shard in zip(names, shards, strict=True):
        head, size = safetensors_head({tensor: found[:2] for tensor, found in shard.items()})
        hub.virtual_file("org/big", name, head, size)
        heads, total = heads + len(head), total + size
    assert total > 400 * GB
    assert len(shards) > 100
    return heads, sum(map(len, files.values()))


def test_400_gigabytes_are_inspected_in_seconds_by_their_headers(hub, run, tmp_path):
    heads, metadata = big_model(hub)
    started = time.monotonic()
    told = json.loads(succeeded(run("inspect", "org/big", "--json")).stdout)
    seconds = time.monotonic() - started
    assert told["checkpoint_bytes"] > 400 * GB
    assert told["parameters"] > 400 * GB
    assert (told["tensors"], told["layers"], told["kv_groups"]) == (1137, 126, 8)
    assert told["revision"] == hub.commit("org/big").sha
    # A header is asked for by a guess of its length that is a little too long, and nothing else of the file is sent.
    assert heads * 0.9 < weight_bytes(hub) < heads * 1.5
    listing = sum(record.bytes_sent for record in hub.requests if record.path.startswith("/api/models/"))
    redirects = sum(record.bytes_sent for record in hub.requests if record.status in (302, 307))
    assert hub.bytes_sent == weight_bytes(hub) + metadata + listing + redirects
    assert hub.bytes_sent < 1_000_000
    assert seconds < 20
    kept = contents(snapshot(tmp_path, "org/big", told["revision"]))
    assert sorted(kept) == ["config.json", "model.safetensors.index.json"]


def test_long_headers_take_a_second_request(hub, run):
    config = llama_config(1000, 8, 2, 2, 8, 16)
    tensors = {name: (fake.dtype, fake.shape) for name, fake in llama_tensors(config).items()}
    head, size = safetensors_head(tensors)
    assert len(head) > 500_000
    hub.add_repo("org/long", {"config.json": json.dumps(config).encode()})
    hub.virtual_file("org/long", "model.safetensors", head, size)
    told = json.loads(succeeded(run("inspect", "org/long", "--json")).stdout)
    assert told["tensors"] == len(tensors)
    assert weight_bytes(hub) == len(head)


def test_what_the_hub_describes_is_what_the_files_hold(hub, run, llama):
    hub.add_repo("org/tiny", llama)
    remote = json.loads(succeeded(run("inspect", "org/tiny", "--json")).stdout)
    local = json.loads(succeeded(run("inspect", llama, "--json")).stdout)
    assert (remote.pop("model"), remote.pop("revision")) == ("org/tiny", hub.commit("org/tiny").sha)
    assert (local.pop("model"), local.pop("revision")) == (str(llama), None)
    assert remote == local


def test_convert_takes_what_it_needs_and_records_the_commit(hub, run, llama, tmp_path):
    old = hub.add_repo("org/tiny", llama)
    other = tiny_llama(tmp_path / "other", intermediate=128)
    hub.add_revision("org/tiny", {**contents(llama), **contents(other)}, "main")
    hub.add_revision("org/tiny", {**contents(llama), **UNNEEDED}, "v1")
    commit = hub.commit("org/tiny", "v1").sha
    assert commit != old
    succeeded(run("convert", "org/tiny@v1", *QUICK, "-o", "out"))
    assert set(contents(snapshot(tmp_path, "org/tiny", commit))) == set(contents(llama))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base_model"] == {"id": "org/tiny", "revision": commit}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/tiny" in card or "base_model:\n- org/tiny" in card
    assert commit in card
    assert "license: mit" in card
    # The same folder as a conversion of the same files that lie in a folder, but for the name of the base.
    succeeded(run("convert", llama, *QUICK, "-o", "local"))
    mine, theirs = digests(tmp_path / "out"), digests(tmp_path / "local")
    named = {"report.json", "README.md"}
    assert {name: mine[name] for name in mine if name not in named} == {
        name: theirs[name] for name in theirs if name not in named
    }


def test_a_second_run_downloads_nothing_and_changes_nothing_in_the_cache(hub, run, llama, tmp_path):
    commit = hub.add_repo("org/tiny", llama)
    succeeded(run("convert", "org/tiny", *QUICK, "-o", "out"))
    cached = digests(tmp_path / "home" / "hub")
    hub.reset()
    succeeded(run("convert", "org/tiny", *QUICK, "-o", "again"))
    assert weight_bytes(hub) == 0
    hub.reset()
    result = succeeded(run("convert", "org/tiny", *QUICK, "-o", "offline", HF_HUB_OFFLINE="1"))
    assert "org/tiny is taken from the cache as it is, since HF_HUB_OFFLINE is set" in result.stderr
    pinned = succeeded(run("inspect", f"org/tiny@{commit}", HF_HUB_OFFLINE="1"))
    assert commit in pinned.stdout
    assert hub.requests == []
    gone = succeeded(run("inspect", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9"))
    assert "no connection to http://127.0.0.1:9" in gone.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "again") == digests(tmp_path / "offline")
    assert digests(tmp_path / "home" / "hub") == cached
    inside = snapshot(tmp_path, "org/tiny", commit)
    refused(run("convert", "org/tiny", *QUICK, "-o", inside / "out"), 1, "lies in the folder of the model")
    refused(run("convert", "org/tiny", *QUICK, "--overwrite", "-o", inside), 1, "is the model itself")
    assert digests(tmp_path / "home" / "hub") == cached


def test_offline_without_the_files(hub, run, llama, tmp_path):
    hub.add_repo("org/tiny", llama)
    refused(run("inspect", "org/tiny", HF_HUB_OFFLINE="1"), 1, "model is not in the cache .*HF_HUB_OFFLINE is set")
    succeeded(run("inspect", "org/tiny"))  # leaves config and index there
    result = run("convert", "org/tiny", *QUICK, "-o", tmp_path / "out", HF_HUB_OFFLINE="1")
    refused(result, 1, "model-00001-of-00003.safetensors is not in the cache", tmp_path / "out")


def test_what_can_be_refused_is_refused_before_weights_are_downloaded(hub, run, llama, tmp_path):
    hub.add_repo("org/tiny", llama)
    strange = Path(shutil.copytree(llama, tmp_path / "strange"))
    edit_json(strange / "config.json", model_type="strange")
    hub.add_repo("org/strange", strange)
    (tmp_path / "bad.yaml").write_text("sharing: {spans: [{layers: 1-99}]}")
    (tmp_path / "greedy.yaml").write_text("sharing: {search: {key_cache: 90%}}")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("")
    succeeded(run("convert", "org/tiny", "--recipe", "late-span", "--dry-run", "-o", "out"))
    out = tmp_path / "out"
    refused(run("convert", "org/tiny", "--recipe", "bad.yaml", "-o", out), 1, "bad.yaml", out)
    refused(run("convert", "org/tiny", "--recipe", "greedy.yaml", "-o", out), 1, "greedy.yaml", out)
    refused(run("convert", "org/strange", *QUICK, "-o", out), 1, "type 'strange' are not supported", out)
    refused(run("convert", "org/tiny", *QUICK, "-o", "there"), 1, "exists already")
    refused(run("analyze", "org/tiny", "--key-cache", "99%", "-o", out), 1, "--key-cache 99%", out)
    sent = {record.path for record in hub.requests if "/cdn/" in record.path and record.range is None}
    assert not sent
    assert weight_bytes(hub) < 60_000  # headers, some of them several times; the shards have 80,000 bytes
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_folder_of_that_name_wins(hub, run, llama, tmp_path):
    hub.add_repo("org/tiny", tiny_llama(tmp_path / "other", layers=3))
    assert '"layers": 3' in succeeded(run("inspect", "org/tiny", "--json")).stdout
    hub.reset()
    shutil.copytree(llama, tmp_path / "org" / "tiny")
    assert '"layers": 4' in succeeded(run("inspect", "org/tiny", "--json")).stdout
    assert hub.requests == []


def test_errors_are_one_line_that_says_what_to_do(hub, run, llama, tmp_path):
    hub.add_repo("org/tiny", llama)
    hub.add_repo("org/private", llama, private=True)
    hub.add_repo("else/gated", llama, gated=True)
    hub.add_repo("org/bare", {"README.md": b""})
    hub.add_repo("org/gguf", {"model-q4.gguf": b"", "README.md": b""})
    hub.add_repo("org/empty", {"config.json": b'{"model_type": "llama"}', "consolidated.safetensors": b"x"})
    hub.add_repo("org/adapter", {**contents(llama), "adapter_config.json": b"{}"})
    partial = contents(llama)
    del partial["model-00002-of-00003.safetensors"]
    hub.add_repo("org/partial", partial)
    hub.add_repo("org/damaged", {**contents(llama), "model-00002-of-00003.safetensors": b"\x10" + b"\0" * 40})
    refused(run("inspect", "org/none"), 1, "org/none: there is no such folder, and no such model on the Hub")
    refused(run("inspect", "org/private"), 1, "for a private model log in with 'hf auth login'")
    refused(run("inspect", "org/private", token=READ_TOKEN), 1, "no such model on the Hub that you may read")
    refused(run("inspect", "else/gated"), 1, f"gated: accept its terms at {hub.url}/else/gated and log in with")
    refused(run("inspect", "else/gated", token=READ_TOKEN), 1, "is gated: accept its terms")
    refused(run("inspect", "org/tiny", token="hf_" + "unknown" * 5), 1, "does not know your token: log in again")
    refused(run("inspect", "org/tiny@nope"), 1, "org/tiny@nope: the model has no such revision")
    refused(run("inspect", "org/a--b"), 1, "the Hub has no models of such names")
    refused(run("inspect", "org/bare"), 1, "has no config.json; give a model in the format of transformers")
    refused(run("inspect", "org/gguf"), 1, "hf download org/gguf model-q4.gguf")
    refused(run("inspect", "org/empty"), 1, "no weights .*; consolidated.safetensors is there, but no index names it")
    refused(run("inspect", "org/adapter"), 1, "merge it into the model first")
    refused(run("inspect", "org/partial"), 1, "names 'model-00002-of-00003.safetensors', which the Hub does not have")
    refused(run("inspect", "org/damaged"), 1, "model-00002-of-00003.safetensors: the header is not a JSON object")
    refused(run("inspect", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9"), 1, "no connection to http://127.0.0.1:9")
    hub.fail("GET /api/models/org/tiny", status=503)
    refused(run("inspect", "org/tiny"), 1, "the Hub answers with an error .HTTP 503.: try again later")
    refused(run("evaluate", "org/none"), 1, "no such model on the Hub")
    refused(run("analyze", "org/none", "-o", tmp_path / "out"), 1, "no such model on the Hub", tmp_path / "out")
    refused(run("inspect", "gpt2"), 1, "models on the Hub are called org/name")


def test_a_dropped_download_goes_on_where_it_stopped(hub, run, tmp_path):
    """Within a run by ranges, as huggingface_hub does it; the next run after one that gave up has whole files only."""
    folder = tiny_llama(tmp_path / "large", 2, vocabulary=400_000)
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    assert min(sizes) > 25_000_000
    hub.add_repo("org/large", folder)
    hub.fail("GET /cdn/.*model-00002", times=1, after_bytes=12_000_000)
    succeeded(run("convert", "org/large", *QUICK, "-o", "out"))
    large = [record for record in hub.requests if "model-00002" in record.path and record.bytes_sent > 100_000]
    kept = 10 * 2**20  # written in pieces of this size
    assert [record.dropped for record in large] == [True, False]
    assert large[1].range.startswith(f"bytes={kept}-")
    assert large[1].bytes_sent == sizes[1] - kept
    succeeded(run("convert", folder, *QUICK, "-o", "local"))
    found = [{k: v for k, v in digests(tmp_path / name).items() if "safe" in k} for name in ("out", "local")]
    assert found[0] == found[1]

    shutil.rmtree(tmp_path / "home")
    hub.reset()
    hub.fail("GET /cdn/.*model-00002", times=6, after_bytes=50_000)
    out = tmp_path / "again"
    refused(run("convert", "org/large", *QUICK, "-o", out), 1, "broke off: run again; files that are complete", out)
    hub.reset()
    succeeded(run("convert", "org/large", *QUICK, "-o", out))
    assert sizes[1] <= weight_bytes(hub) < sizes[1] + 200_000
    assert digests(out) == digests(tmp_path / "out")


def test_a_header_that_breaks_off_is_asked_for_again(hub, run, llama):
    hub.add_repo("org/tiny", llama)
    hub.fail("GET /cdn/", times=2, after_bytes=100)
    assert succeeded(run("inspect", "org/tiny", "--json")).stdout
    hub.fail("GET /cdn/", times=100, after_bytes=100)
    refused(run("inspect", "org/tiny"), 1, "the connection to http://127.0.0.1:[0-9]+ broke off")


def test_weights_that_have_no_headers(hub, run, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = tiny_llama(tmp_path / "plain")
    save_tokenizer(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    hub.add_repo("org/old", folder)
    result = succeeded(run("inspect", "org/old", "--json"))
    told = json.loads(result.stdout)
    assert "org/old has .bin files only, which have no headers that could be read without downloading" in result.stderr
    assert weight_bytes(hub) == 0
    assert (told["tensors"], told["layers"], told["dtypes"]) == (39, 4, {"BF16": 40_224})
    succeeded(run("convert", "org/old", *QUICK, "-o", "out"))
    succeeded(run("convert", "org/old", *QUICK, "-o", "again"))
    succeeded(run("convert", "org/old", *QUICK, "-o", "offline", HF_HUB_OFFLINE="1"))
    found = [digests(tmp_path / name)["model.safetensors"] for name in ("out", "again", "offline")]
    assert len(set(found)) == 1
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        tensor.view(torch.int16).equal(state[name].view(torch.int16))
        for name, tensor in kept.items()
        if tensor.shape == state[name].shape
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base_model"] == {"id": "org/old", "revision": hub.commit("org/old").sha}


def test_convert_validates_and_evaluate_and_analyze_take_hub_names(hub, run, base, recipe, tmp_path):
    commit = hub.add_repo("org/base", base)
    succeeded(run("convert", "org/base", "--recipe", recipe, "-o", "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["base_model"]["revision"] == commit
    assert report["gate"]["passed"]
    hub.add_repo("org/shared", tmp_path / "out")
    small = ("--sequences", 2, "--length", 64, "--json")
    told = json.loads(succeeded(run("evaluate", "org/shared", "--against", "org/base", *small)).stdout)
    assert told["model"]["id"] == "org/shared"
    assert told["against"]["id"] == "org/base"
    local = json.loads(succeeded(run("evaluate", "out", "--against", base, *small)).stdout)
    assert told["model"]["perplexity"] == local["model"]["perplexity"]
    assert told["agreement"] == local["agreement"]
    analysis = succeeded(run("analyze", "org/base", "-o", "analysis", *small)).stdout
    assert json.loads(analysis)["base_model"] == {"id": "org/base", "revision": commit}


def test_proxies_and_stored_logins_are_those_of_huggingface_hub(hub, run, llama, tmp_path):
    hub.add_repo("org/private", llama, private=True)
    proxy = {"HF_ENDPOINT": "http://hub.example", "HTTP_PROXY": hub.url, "http_proxy": hub.url}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(WRITE_TOKEN)
    succeeded(run("inspect", "org/private", **proxy))
    asked = [record for record in hub.requests if record.host == "hub"]
    assert asked
    assert all(record.proxied for record in asked)
    assert {record.token for record in asked} == {WRITE_TOKEN}
    assert all(record.token is None for record in hub.requests if record.host == "cdn")


def test_tokens_never_appear(hub, run, llama, tmp_path):
    """In success and failure, on the terminal, in the output, and where a library warns of an address."""
    hub.add_repo("org/tiny", llama, private=True)
    wrong = "hf_" + "unknown" * 5
    secrets = (WRITE_TOKEN, wrong, "s3cret")
    told = []

    def attempt(status, *arguments, **changes):
        result = run(*arguments, **{"token": WRITE_TOKEN, **changes})
        assert result.returncode == status, result.stderr
        told.append(result.stdout + result.stderr)

    address = hub.url.replace("//", "//user:s3cret@")
    attempt(0, "convert", "org/tiny", *QUICK, "-o", "out")
    attempt(1, "inspect", "org/none", SA_CONVERT_DEBUG="1")
    attempt(1, "inspect", "org/tiny", token=wrong, SA_CONVERT_DEBUG="1")
    attempt(1, "inspect", "org/none", HF_ENDPOINT=address, SA_CONVERT_DEBUG="1")
    attempt(1, "inspect", "org/none", HF_ENDPOINT="http://user:s3cret@127.0.0.1:9", SA_CONVERT_DEBUG="1")
    attempt(1, "inspect", f"org/{WRITE_TOKEN}")
    hub.fail("GET /cdn/", times=100, after_bytes=10)
    shutil.rmtree(tmp_path / "home")
    attempt(1, "inspect", "org/tiny", SA_CONVERT_DEBUG="1", HF_ENDPOINT=address)
    hub.reset()
    hub.fail("HEAD .*config.json", times=100, status=503)
    attempt(1, "inspect", "org/tiny", SA_CONVERT_DEBUG="1", HF_ENDPOINT=address)
    for secret in secrets:
        assert not [text for text in told if secret in text]
        for folder in ("out", "home"):
            files = (tmp_path / folder).rglob("*")
            assert not [path for path in files if path.is_file() and secret.encode() in path.read_bytes()]
