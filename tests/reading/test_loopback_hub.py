"""The loopback Hub, driven by huggingface_hub itself: what passes here is what the tests of Hub models stand on."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from support.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub, safetensors_head

CARD = b"---\nlicense: mit\ntags: [a, b]\nlibrary_name: transformers\n---\n# A model\n"
WEIGHTS = safetensors_head({"a": ("F32", (100_000,))})[0] + bytes(range(250)) * 1600
FILES = {"README.md": CARD, "config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "sub/x.txt": b"x"}


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        running.add_repo("org/model", FILES)
        yield running


def client(hub, tmp_path, code, token=None, succeeds=True, **environment):
    """Run code of a user of huggingface_hub as a process; what it puts into `result` comes back."""
    start = "import json\nfrom huggingface_hub import *\napi, result = HfApi(), None\n"
    script = start + textwrap.dedent(code) + "\nprint('RESULT' + json.dumps(result))"
    inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **hub.environment(tmp_path / "cache", token), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode == 0) == succeeds, ran.stderr
    return json.loads(ran.stdout.split("RESULT")[1]) if succeeds else ran.stderr


def served(hub, method, part):
    return [record for record in hub.requests if record.method == method and part in record.path]


def test_information_and_listings(hub, tmp_path):
    first = hub.commit("org/model").sha
    hub.add_tag("org/model", "v1")
    second = hub.add_revision("org/model", {"config.json": b"{}"}, title="Less")
    hub.page_size = 2
    result = client(
        hub,
        tmp_path,
        """
        info = api.model_info("org/model", revision="v1", files_metadata=True)
        [weights] = [file for file in info.siblings if file.rfilename == "model.safetensors"]
        result = {
            "info": [info.sha, info.tags, info.gated, info.private, info.card_data.license, info.library_name],
            "files": [file.rfilename for file in info.siblings],
            "weights": [weights.size, weights.lfs.sha256, weights.lfs.pointer_size],
            "tree": [entry.path for entry in api.list_repo_tree("org/model", recursive=True, revision="v1")],
            "top": [entry.path for entry in api.list_repo_tree("org/model", revision="v1")],
            "sub": [entry.path for entry in api.list_repo_tree("org/model", "sub", revision="v1", expand=True)],
            "paths": [[entry.path, getattr(entry, "blob_id", None)] for entry in
                      api.get_paths_info("org/model", ["sub", "no", "README.md"], revision="v1")],
            "main": api.model_info("org/model").sha,
            "refs": [ref.name for ref in api.list_repo_refs("org/model").tags],
            "commits": [[commit.commit_id, commit.title] for commit in api.list_repo_commits("org/model")],
        }
        """,
    )
    assert result["info"] == [first, ["a", "b"], False, False, "mit", "transformers"]
    assert result["files"] == list(FILES)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {len(WEIGHTS)}\n"
    assert result["weights"] == [len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest(), len(pointer)]
    assert result["tree"] == ["README.md", "config.json", "model.safetensors", "sub", "sub/x.txt"]
    assert len(served(hub, "GET", "recursive=true")) == 1
    assert len(served(hub, "GET", "cursor=")) >= 3  # of five entries in pages of two, and of four
    assert result["top"] == ["README.md", "config.json", "model.safetensors", "sub"]
    assert result["sub"] == ["sub/x.txt"]
    git_hash = hashlib.sha1(f"blob {len(CARD)}\0".encode() + CARD).hexdigest()
    assert result["paths"] == [["sub", None], ["README.md", git_hash]]
    assert (result["main"], result["refs"]) == (second, ["v1"])
    assert result["commits"] == [[second, "Less"], [first, "initial commit"]]
    assert not hub.unanswered


def test_downloads_by_redirects_without_leaking_the_token(hub, tmp_path):
    old = hub.commit("org/model").sha
    hub.add_revision("org/model", {**FILES, "config.json": b"{}"})
    result = client(
        hub,
        tmp_path,
        f"""
        folder = snapshot_download("org/model", allow_patterns=["*.safetensors", "*.json"])
        result = [folder, hf_hub_download("org/model", "sub/x.txt"),
                  hf_hub_download("org/model", "config.json", revision="{old}")]
        """,
        token=READ_TOKEN,
    )
    snapshot = Path(result[0])
    assert snapshot.name == hub.commit("org/model").sha
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert (snapshot / "config.json").read_bytes() == b"{}"
    assert not (snapshot / "README.md").exists()
    assert Path(result[1]).read_bytes() == b"x"
    assert Path(result[2]).read_bytes() == FILES["config.json"]
    [stored] = served(hub, "GET", "/cdn/")
    assert (stored.host, stored.status, stored.bytes_sent, stored.token) == ("cdn", 200, len(WEIGHTS), None)
    assert {record.token for record in hub.requests if record.host == "hub"} == {READ_TOKEN, None}
    assert served(hub, "HEAD", "/resolve/main/sub/x.txt")[0].status == 307
    assert not any(record.bytes_sent for record in served(hub, "HEAD", ""))
    assert not hub.unanswered


def test_a_dropped_download_resumes_and_a_busy_hub_is_asked_again(hub, tmp_path):
    # huggingface_hub keeps what it got in pieces of 10 MiB: of smaller files nothing is left to resume.
    weights, piece = WEIGHTS * 60, 10 << 20
    hub.add_revision("org/model", {"model.safetensors": weights})
    hub.fail(r"GET /cdn/.*filename=model\.safetensors", after_bytes=15_000_000)
    hub.fail("/tree/", status=503)
    folder = client(hub, tmp_path, "result = snapshot_download('org/model')")
    assert (Path(folder) / "model.safetensors").read_bytes() == weights
    cut, resumed = served(hub, "GET", "/cdn/")
    assert (cut.dropped, cut.status, cut.bytes_sent) == (True, 200, 15_000_000)
    assert (resumed.status, resumed.range, resumed.bytes_sent) == (206, f"bytes={piece}-", len(weights) - piece)
    assert [record.status for record in served(hub, "GET", "/tree/")] == [503, 200]


def test_refusals_are_the_exceptions_of_the_hub(hub, tmp_path):
    hub.add_repo("org/hidden", FILES, private=True)
    hub.add_repo("org/gated", FILES, gated=True)
    hub.users["hf_granted"] = {"name": "friend", "role": "read", "gated": ["org/gated"]}
    result = client(
        hub,
        tmp_path,
        f"""
        from huggingface_hub.utils import HfHubHTTPError
        def outcome(function, *arguments, **options):
            try:
                function(*arguments, **options)
            except HfHubHTTPError as error:
                return f"{{type(error).__name__}} {{error.response.status_code}}"
            return "done"
        result = [
            outcome(api.model_info, "org/none"),
            outcome(api.model_info, "org/none", token="{READ_TOKEN}"),
            outcome(api.model_info, "org/hidden"),
            outcome(hf_hub_download, "org/hidden", "config.json", token="{READ_TOKEN}"),
            outcome(hf_hub_download, "org/hidden", "config.json", token="{WRITE_TOKEN}"),
            outcome(api.model_info, "org/gated"),
            outcome(hf_hub_download, "org/gated", "config.json"),
            outcome(snapshot_download, "org/gated", token="{READ_TOKEN}"),
            outcome(hf_hub_download, "org/gated", "config.json", token="hf_granted"),
            outcome(api.auth_check, "org/gated", token="{READ_TOKEN}"),
            outcome(api.model_info, "org/model", revision="nowhere"),
            outcome(hf_hub_download, "org/model", "config.json", revision="nowhere"),
            outcome(hf_hub_download, "org/model", "absent.json"),
            outcome(lambda: list(api.list_repo_tree("org/model", "absent"))),
            outcome(api.model_info, "org/model", token="hf_wrong"),
            outcome(api.whoami, token="hf_wrong"),
            outcome(api.create_repo, "org/new", token="{READ_TOKEN}"),
            outcome(api.create_repo, "elsewhere/new", token="{WRITE_TOKEN}"),
            outcome(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="org/model", token="{READ_TOKEN}"),
        ]
        """,
    )
    assert result == [
        "RepositoryNotFoundError 401",
        "RepositoryNotFoundError 404",
        "RepositoryNotFoundError 401",
        "RepositoryNotFoundError 404",
        "done",
        "done",
        "GatedRepoError 401",
        "GatedRepoError 403",
        "done",
        "GatedRepoError 403",
        "RevisionNotFoundError 404",
        "RevisionNotFoundError 404",
        "RemoteEntryNotFoundError 404",
        "RemoteEntryNotFoundError 404",
        "HfHubHTTPError 401",
        "HfHubHTTPError 401",
        "HfHubHTTPError 403",
        "HfHubHTTPError 403",
        "HfHubHTTPError 403",
    ]


def test_a_model_of_400_gigabytes_exists_as_headers(hub, tmp_path):
    weights = {}
    hub.add_repo("org/huge", {"config.json": b"{}"})
    for shard in range(1, 101):
        # The first header is larger than what is asked for at once, and so asked for again.
        small = {f"layers.{shard}.norm.{number}": ("BF16", (8,)) for number in range(2000 if shard == 1 else 1)}
        head, size = safetensors_head({f"layers.{shard}.big": ("BF16", (2_000_000_000,)), **small})
        path = f"model-{shard:05d}-of-00100.safetensors"
        hub.virtual_file("org/huge", path, head, size)
        weights |= dict.fromkeys([f"layers.{shard}.big", *small], path)
    index = json.dumps({"metadata": {}, "weight_map": weights}).encode()
    files = hub.commit("org/huge").files
    contents = {path: file.content for path, file in files.items()}
    hub.add_revision("org/huge", {**contents, "model.safetensors.index.json": index})
    result = client(
        hub,
        tmp_path,
        """
        metadata = api.get_safetensors_metadata("org/huge")
        sizes = sum(file.size for file in api.list_repo_tree("org/huge"))
        result = [metadata.parameter_count["BF16"], len(metadata.weight_map), sizes]
        """,
    )
    assert result[0] == 100 * 2_000_000_000 + 8 * (2000 + 99)
    assert (result[1], result[2] > 400e9) == (len(weights), True)
    ranges = [record for record in served(hub, "GET", "/cdn/") if record.status == 206]
    assert len(ranges) == 101
    assert len(index) < hub.bytes_sent < 12_000_000


def test_repositories_branches_and_who_may_make_them(hub, tmp_path):
    result = client(
        hub,
        tmp_path,
        """
        url = api.create_repo("org/new", private=True)
        again = api.create_repo("org/new", exist_ok=True)
        api.create_branch("org/new", branch="side/way")
        api.create_tag("org/new", tag="v0")
        commit = api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/new", revision="side/way")
        refs = api.list_repo_refs("org/new")
        mine = api.create_repo("small")
        try:
            api.create_repo("org/new")
        except Exception as error:
            refusal = str(error)
        api.delete_repo("org/model")
        result = [url, again.repo_id, [ref.name for ref in refs.branches], mine.repo_id, refusal, commit.oid,
                  api.repo_exists("org/model"), [org["name"] for org in api.whoami()["orgs"]]]
        """,
        token=WRITE_TOKEN,
    )
    assert result[:4] == [f"{hub.url}/org/new", "org/new", ["main", "side/way"], "tester/small"]
    assert "already created" in result[4]
    assert result[5] == hub.commit("org/new", "side/way").sha
    assert result[6:] == [False, ["org"]]
    assert hub.repositories["model", "org/new"].private
    assert list(hub.files("org/new")) == [".gitattributes"]
    assert hub.files("org/new", "side/way")["x"] == b"x"
    assert hub.commit("org/new", "v0").title == "initial commit"


UPLOAD = """
api.create_repo("org/new", exist_ok=True)
result = api.upload_folder(repo_id="org/new", folder_path={folder!r}, commit_message="All of it").oid
"""


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    for path, data in {**FILES, "other.safetensors": WEIGHTS[::-1]}.items():
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_bytes(data)
    return made


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_uploads_a_folder_in_one_commit(hub, tmp_path, folder):
    (folder / "long.txt").write_bytes(b"0123456789\n" * 1_000_000)
    oid = client(hub, tmp_path, UPLOAD.format(folder=str(folder)), WRITE_TOKEN)
    assert [commit.title for commit in hub.commits("org/new")] == ["All of it", "initial commit"]
    pushed = hub.files("org/new")
    assert pushed.pop(".gitattributes")
    assert pushed == contents(folder)
    stored = served(hub, "PUT", "/s3/org/new/")
    assert sorted(record.bytes_received for record in stored) == sorted([len(WEIGHTS), len(WEIGHTS), 11_000_000])
    assert {record.token for record in stored} == {None}
    assert {path for path, file in hub.commit("org/new").files.items() if file.lfs} == {
        "model.safetensors",
        "other.safetensors",
        "long.txt",
    }
    hub.reset()
    # The same again changes nothing, a commit on top of another than the last one is refused.
    assert client(hub, tmp_path, UPLOAD.format(folder=str(folder)), WRITE_TOKEN) == oid
    assert not served(hub, "PUT", "")
    assert not served(hub, "POST", "/commit/")
    parent = hub.commits("org/new")[1].sha
    late = f"api.upload_file(path_or_fileobj=b'', path_in_repo='y', repo_id='org/new', parent_commit={parent!r})"
    assert "A commit has happened since" in client(hub, tmp_path, late, WRITE_TOKEN, succeeds=False)
    client(hub, tmp_path, "api.delete_folder('sub', 'org/new'); api.delete_file('long.txt', 'org/new')", WRITE_TOKEN)
    assert set(contents(folder)) - set(hub.files("org/new")) == {"sub/x.txt", "long.txt"}


def test_a_dropped_upload_is_sent_again_and_a_failed_one_continues(hub, tmp_path, folder):
    oids = {hashlib.sha256(data).hexdigest(): len(data) for data in (WEIGHTS, WEIGHTS[::-1])}
    first, second = oids
    hub.fail(f"PUT /s3/org/new/{first}", after_bytes=70_000)
    hub.fail(f"PUT /s3/org/new/{second}", status=403)
    assert "other.safetensors" in client(hub, tmp_path, UPLOAD.format(folder=str(folder)), WRITE_TOKEN, succeeds=False)
    cut, whole = served(hub, "PUT", first)
    assert (cut.dropped, cut.status, cut.bytes_received) == (True, None, 70_000)
    assert (whole.dropped, whole.status, whole.bytes_received) == (False, 200, len(WEIGHTS))
    assert list(hub.files("org/new")) == [".gitattributes"]

    hub.reset()
    hub.fail("/commit/main", after_bytes=0)
    assert "RemoteProtocolError" in client(
        hub, tmp_path, UPLOAD.format(folder=str(folder)), WRITE_TOKEN, succeeds=False
    ).replace("ReadError", "RemoteProtocolError")
    assert [record.path.split("?")[0] for record in served(hub, "PUT", "")] == [f"/s3/org/new/{second}"]
    assert len(hub.commits("org/new")) == 1

    hub.reset()
    client(hub, tmp_path, UPLOAD.format(folder=str(folder)), WRITE_TOKEN)
    assert not served(hub, "PUT", "")
    assert hub.files("org/new")["other.safetensors"] == WEIGHTS[::-1]


def test_large_objects_are_uploaded_in_parts(hub, tmp_path, folder):
    hub.multipart_size, hub.part_size = 300_000, 128 * 1024
    hub.fail("partNumber=2", after_bytes=10)
    client(hub, tmp_path, UPLOAD.format(folder=str(folder)), WRITE_TOKEN)
    assert hub.files("org/new")["model.safetensors"] == WEIGHTS
    sent = served(hub, "PUT", hashlib.sha256(WEIGHTS).hexdigest()) + served(
        hub, "PUT", hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    )
    assert sum(record.bytes_received for record in sent if record.status == 200) == 2 * len(WEIGHTS)
    assert sum(record.dropped for record in sent) == 1


def test_cards_are_validated(hub, tmp_path):
    result = client(
        hub,
        tmp_path,
        """
        import warnings
        def outcome(text):
            try:
                ModelCard(text).validate()
            except ValueError as error:
                return str(error)
        head = "license: mit\\nbase_model: org/model\\n"
        result = [outcome(f"---\\n{head}{more}\\n---\\n# A card") for more in (
            "base_model_relation: quantized",
            "base_model_relation: cousin",
            "tags: [1]",
            "language: English",
            "model-index: [{name: m, results: [{task: {type: text-generation}, dataset: {name: d, type: t}, "
            "metrics: [{type: perplexity, value: 7.5}]}]}]",
        )]
        result.append(outcome("---\\nlicense: apache\\nbase_model: /local/folder\\n---\\n"))
        for text in (b"license: 1", b"model-index: [{name: m, results: [{task: {type: text-generation}}]}]", b"a: ["):
            try:
                text = b"---\\n" + text + b"\\n---\\n"
                api.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id="org/model")
            except ValueError as error:
                result.append(str(error))
        with warnings.catch_warnings(record=True) as caught:
            api.upload_file(path_or_fileobj=b"# Bare", path_in_repo="README.md", repo_id="org/model")
        result.append(str(caught[-1].message))
        """,
        WRITE_TOKEN,
    )
    assert result[0] is None
    assert '"base_model_relation" must be one of' in result[1]
    assert '"tags" must be' in result[2]
    assert '"language"' in result[3]
    assert result[4] is None
    assert '"license" must be one of' in result[5]
    assert '"base_model" with value "/local/folder" is not valid' in result[5]
    assert '"license" must be a string' in result[6]
    assert '"model-index[0].results[0].dataset.type" is required' in result[7]
    assert "YAML metadata in repo card is invalid" in result[8]
    assert "empty or missing yaml metadata" in result[9]
    assert hub.files("org/model")["README.md"] == b"# Bare"
    assert len(hub.commits("org/model")) == 2


def fetch(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return response.status, response.headers.get("Content-Range"), response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Content-Range"), error.read()


def test_ranges(hub):
    url, size = f"{hub.url}/org/model/resolve/main/model.safetensors", len(WEIGHTS)
    assert fetch(url, Range="bytes=5-9") == (206, f"bytes 5-9/{size}", WEIGHTS[5:10])
    last = (206, f"bytes {size - 3}-{size - 1}/{size}", WEIGHTS[-3:])
    assert fetch(url, Range=f"bytes={size - 3}-{size + 10}") == last
    assert fetch(url, Range="bytes=-3") == last
    assert fetch(url, Range=f"bytes={size}-")[:2] == (416, f"bytes */{size}")
    assert fetch(url) == (200, None, WEIGHTS)
    [location] = {record.path for record in served(hub, "GET", "/cdn/")}
    assert fetch(hub.cdn_url + location)[0] == 200
    assert fetch(hub.cdn_url + location[:-1])[0] == 403


def test_stands_in_for_a_proxy(hub, tmp_path):
    path = client(
        hub,
        tmp_path,
        "result = hf_hub_download('org/model', 'model.safetensors')",
        HF_ENDPOINT="http://hub.invalid",
        HTTP_PROXY=hub.url,
        NO_PROXY="",
        no_proxy="",
    )
    assert Path(path).read_bytes() == WEIGHTS
    assert hub.requests
    assert all(record.proxied for record in hub.requests)


def test_runs_as_a_process(tmp_path, folder):
    (tmp_path / "root" / "org").mkdir(parents=True)
    folder.rename(tmp_path / "root" / "org" / "model")
    port = tmp_path / "port"
    command = [sys.executable, "-m", "support.loopback_hub", "--root", tmp_path / "root", "--port-file", port]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not port.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        url = f"http://127.0.0.1:{port.read_text()}/org/model/resolve/main/config.json"
        assert fetch(url) == (200, None, FILES["config.json"])
    finally:
        process.terminate()
        process.wait(20)
