"""`sa-convert push` and `convert --push-to`, against a Hub on the loopback interface."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from sa_convert.errors import OutputError
from sa_convert.plan.audited import expected_code
from sa_convert.present.hub.upload_errors import push_errors
from support.cli_cases import SPAN, digests, refused
from support.loopback_hub import READ_TOKEN, WRITE_TOKEN, LoopbackHub
from support.processes import run_cli, run_without_sa_convert
from support.tiny_models import load_converted, write_recipe

REPO = "org/shared"
OTHER = {2: [[1, 7 - head] for head in range(8)], 4: [[3, 0], None, [0, 2], None, None, None, [1, 1], [1, 5]]}
PROMPT = [[5, 17, 99, 42, 23]]


LATER = {"2": {"0": {"share": [[3, 0]] * 2}}}
"""In the plan of a folder: a layer that reuses a later one."""


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """Two validated conversions with the same name, and one that was not validated."""
    root = tmp_path_factory.mktemp("folders")
    made = {}
    for place, rows, options in (("a", SPAN, []), ("b", OTHER, []), ("raw", SPAN, ["--no-validate"])):
        (root / place).mkdir()
        recipe = write_recipe(root / f"{place}.json", rows, gate={"max_perplexity_increase": "60%"})
        made[place] = root / place / "model"
        result = run_cli("convert", base, "--recipe", recipe, "-o", made[place], *options)
        assert result.returncode == 0, result.stderr
    return made


@pytest.fixture
def folder(folders, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders["a"], tmp_path / "model"))


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as server:
        yield server
        assert server.unanswered == []


def run_on(hub, tmp_path, *arguments, token=WRITE_TOKEN, **changes):
    """The command line as a process that uses this Hub; no token shows up in what it prints."""
    result = run_cli(*arguments, env={**hub.environment(tmp_path / "cache", token), **changes})
    for secret in (WRITE_TOKEN, READ_TOKEN, token or WRITE_TOKEN):
        assert secret not in result.stdout + result.stderr
    assert "Signature=" not in result.stdout + result.stderr
    return result


def commits_posted(hub):
    return [record for record in hub.requests if record.method == "POST" and "/commit/" in record.path]


def uploads(hub):
    return [record for record in hub.requests if record.method == "PUT"]


def nothing_uploaded(hub):
    return not commits_posted(hub) and not uploads(hub)


def test_one_commit_of_all_files_and_the_url(folders, hub, tmp_path):
    before = digests(folders["a"])
    result = run_on(hub, tmp_path, "push", folders["a"], REPO)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{hub.url}/{REPO}\n"
    assert "uploading" in result.stderr
    assert "%|" in result.stderr
    assert [commit.title for commit in hub.commits(REPO)] == ["Upload model with shared attention", "initial commit"]
    assert len(commits_posted(hub)) == 1
    pushed = hub.files(REPO)
    assert set(pushed) == set(before) | {".gitattributes"}
    assert digests(folders["a"]) == before
    for name in before:
        assert pushed[name] == (folders["a"] / name).read_bytes() or name == "README.md"
    assert not any(WRITE_TOKEN.encode() in content for content in pushed.values())
    readme = pushed["README.md"].decode()
    assert readme.count(f'from_pretrained("{REPO}", trust_remote_code=True)') == 2
    assert "PATH_OR_REPO_ID" not in readme
    assert readme.replace(REPO, "PATH_OR_REPO_ID") == (folders["a"] / "README.md").read_text()


def test_second_push_sends_nothing_twice(folders, hub, tmp_path):
    first = json.loads(run_on(hub, tmp_path, "push", folders["a"], REPO, "--json").stdout)
    assert first == {"url": f"{hub.url}/{REPO}", "commit": hub.commits(REPO)[0].sha}
    hub.reset()
    again = run_on(hub, tmp_path, "push", folders["a"], REPO, "--json")
    assert json.loads(again.stdout) == first
    assert nothing_uploaded(hub)


def test_private_repository_on_a_branch(folders, hub, tmp_path):
    result = run_on(hub, tmp_path, "push", folders["a"], "shared", "--private", "--revision", "light")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{hub.url}/tester/shared/tree/light\n"
    assert hub.repositories["model", "tester/shared"].private
    assert set(hub.files("tester/shared")) == {".gitattributes"}
    readme = hub.files("tester/shared", "light")["README.md"].decode()
    assert 'from_pretrained("tester/shared", revision="light", trust_remote_code=True)' in readme


def test_new_branch_of_the_base_model_and_weights_of_an_earlier_layout(base, folders, hub, tmp_path):
    """Weights that transformers would take for ours, or that nothing names any more, are gone."""
    hub.add_repo("org/tiny", base)
    hub.add_revision("org/tiny", {**hub.files("org/tiny"), "model.safetensors": b"whole", "notes.md": b"mine"})
    result = run_on(hub, tmp_path, "push", folders["a"], "org/tiny", "--revision", "shared")
    assert result.returncode == 0, result.stderr
    files = hub.files("org/tiny", "shared")
    assert {name for name in files if name.endswith(".safetensors")} == {
        path.name for path in folders["a"].glob("*.safetensors")
    }
    assert files["notes.md"] == b"mine"
    assert "model.safetensors" in hub.files("org/tiny")
    hub.add_revision("org/tiny", {**files, "model-00099-of-00099.safetensors": b"old"}, "shared")
    assert run_on(hub, tmp_path, "push", folders["b"], "org/tiny", "--revision", "shared").returncode == 0
    assert "model-00099-of-00099.safetensors" not in hub.files("org/tiny", "shared")
    assert hub.files("org/tiny", "shared")["notes.md"] == b"mine"


def test_only_the_conversion_is_uploaded(folder, hub, tmp_path):
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    result = run_on(hub, tmp_path, "push", folder, REPO)
    assert result.returncode == 0, result.stderr
    assert "no part of the conversion: checkpoint-5/model.safetensors, optimizer.pt" in result.stderr
    assert not {".env", "optimizer.pt", "checkpoint-5/model.safetensors"} & set(hub.files(REPO))


def edit(name, change, folder):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def shorten(folder):
    shard = sorted(folder.glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-8])


def link_out(name, folder):
    (folder.parent / "secret").write_text("secret")
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "secret")


def remove(name, folder):
    (folder / name).unlink()


def append(name, folder):
    with (folder / name).open("a") as file:
        file.write("\n")


def restore_group(report):
    report["sharing"]["layers"]["3"][0] = None


DAMAGES = {
    "no config": (partial(remove, "config.json"), 1, "no config.json"),
    "no map": (partial(edit, "config.json", lambda config: config.pop("shared_attention")), 1, "is no conversion"),
    "bad map": (
        partial(
            edit,
            "config.json",
            lambda config: config["shared_attention"]["layers"].update(LATER),
        ),
        1,
        "layer 3",
    ),
    "no shard": (partial(remove, "model-00004-of-00013.safetensors"), 1, "is missing"),
    "short shard": (shorten, 1, "bytes long"),
    "no index": (partial(remove, "model.safetensors.index.json"), 1, "no weights"),
    "no code": (partial(remove, "shared_attention_share.py"), 1, "shared_attention_share.py is missing"),
    "other code": (partial(append, "modeling_shared_attention.py"), 1, "modeling_shared_attention.py is not what this"),
    "no report": (partial(remove, "report.json"), 1, "report.json"),
    "no card": (partial(remove, "README.md"), 1, "README.md"),
    "no recipe": (partial(remove, "recipe.yaml"), 1, "recipe.yaml"),
    "no figure": (partial(remove, "figures/sharing.png"), 1, "sharing.png"),
    "report of another map": (partial(edit, "report.json", restore_group), 1, "another plan"),
    "report without parts": (partial(edit, "report.json", lambda report: report.pop("gate")), 1, "not as sa-convert"),
    "report of other weights": (
        partial(edit, "report.json", lambda report: report["savings"]["checkpoint_bytes"].update(after=1)),
        1,
        "says that 1 were written",
    ),
    "gate": (
        partial(edit, "report.json", lambda report: report["gate"].update(passed=False, max_perplexity_increase=0.001)),
        3,
        r"changes by \+.*, more than its limit of 0.1%",
    ),
    "decoding": (
        partial(edit, "report.json", lambda report: report["decode_check"].update(same_greedy_tokens=False)),
        3,
        "decodes otherwise",
    ),
    "card is a link": (partial(link_out, "README.md"), 1, "leads out of the model's folder"),
    "code is a link": (partial(link_out, "shared_attention_share.py"), 1, "is not that of|leads out"),
    "tokenizer is a link": (partial(link_out, "tokenizer.json"), 1, "leads out of the model's folder"),
    "figure is a link": (partial(link_out, "figures/sharing.png"), 1, "leads out of the model's folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_or_refused_folders_upload_nothing(folder, hub, tmp_path, damage):
    spoil, status, message = DAMAGES[damage]
    spoil(folder)
    refused(run_on(hub, tmp_path, "push", folder, REPO), status, message)
    assert hub.requests == []


def test_not_a_conversion(base, hub, tmp_path):
    refused(run_on(hub, tmp_path, "push", base, REPO), 1, "is no conversion")
    refused(run_on(hub, tmp_path, "push", tmp_path / "nothing", REPO), 1, "no such folder")
    assert hub.requests == []


def test_unvalidated_only_when_asked(folders, hub, tmp_path):
    refused(run_on(hub, tmp_path, "push", folders["raw"], REPO), 1, "--no-validate.*--allow-unvalidated")
    assert hub.requests == []
    result = run_on(hub, tmp_path, "push", folders["raw"], REPO, "--allow-unvalidated")
    assert result.returncode == 0, result.stderr
    assert "**Not measured:**" in hub.files(REPO)["README.md"].decode()


@pytest.mark.parametrize(
    ("repo_id", "options", "message"),
    [
        (REPO, {"token": None}, "no token to push with.*hf auth login"),
        (REPO, {"token": "hf_unknownToken"}, "does not accept your token"),
        ("reader/model", {"token": READ_TOKEN}, "may only read"),
        ("stranger/model", {}, "'stranger' is neither your account"),
        ("a/b/c", {}, "is no name of a repository"),
        ("org/no--name", {}, "is no name of a repository"),
        (REPO, {"HF_HUB_OFFLINE": "1"}, "offline mode"),
        (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "connection to http://127.0.0.1:9 fails"),
        ("org/taken", {}, "holds a model of type 'llama'"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_the_hub_would_refuse(base, folders, hub, tmp_path, repo_id, options, message):
    hub.add_repo("org/taken", base)
    refused(run_on(hub, tmp_path, "push", folders["a"], repo_id, **options), 1, message)
    assert nothing_uploaded(hub)
    assert ("model", REPO) not in hub.repositories


def test_public_repository_is_not_pushed_to_as_private(folders, hub, tmp_path):
    hub.add_repo(REPO, {"notes.md": b"mine"})
    refused(run_on(hub, tmp_path, "push", folders["a"], REPO, "--private"), 1, "exists and is public")
    assert nothing_uploaded(hub)


def test_weights_of_another_kind_are_not_replaced(folders, hub, tmp_path):
    hub.add_repo(REPO, {"model.gguf": b"GGUF"})
    refused(run_on(hub, tmp_path, "push", folders["a"], REPO), 1, "holds 'model.gguf'")
    assert nothing_uploaded(hub)


def test_forbidden_by_the_hub_itself(folders, hub, tmp_path):
    """What the token does not show beforehand."""
    hub.fail("POST /api/repos/create", status=403)
    refused(run_on(hub, tmp_path, "push", folders["a"], REPO), 1, "may not write there")
    assert nothing_uploaded(hub)


def test_card_that_the_hub_refuses(folder, hub, tmp_path):
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("---\n", "---\nlicense: my-own\n", 1))
    refused(run_on(hub, tmp_path, "push", folder, REPO), 1, 'refuses the model card: .*"license" must be one of')
    assert nothing_uploaded(hub)


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("PUT /s3/", {"after_bytes": 1000}),
        ("PUT /s3/", {"status": 503}),
        ("POST .*/commit/", {"after_bytes": 1000}),
        ("POST .*/commit/", {"status": 502}),
        ("POST /api/validate-yaml", {"after_bytes": 10}),
    ],
)
def test_dropped_connection_is_taken_up_again(folders, hub, tmp_path, pattern, fault):
    hub.fail(pattern, **fault)
    result = run_on(hub, tmp_path, "push", folders["a"], REPO)
    assert result.returncode == 0, result.stderr
    assert len(hub.commits(REPO)) == 2
    whole = [record.path for record in uploads(hub) if record.status == 200]
    assert len(whole) == len(set(whole)) == len(list(folders["a"].glob("*.safetensors")))


def test_second_run_goes_on_where_the_first_stopped(folders, hub, tmp_path):
    hub.fail("POST .*/commit/", times=99, status=503)
    refused(run_on(hub, tmp_path, "push", folders["a"], REPO), 1, "status 503.*run 'sa-convert push' again")
    assert len(hub.commits(REPO)) == 1
    hub.reset()
    assert run_on(hub, tmp_path, "push", folders["a"], REPO).returncode == 0
    assert uploads(hub) == []
    assert len(hub.commits(REPO)) == 2


def test_interruption_says_how_to_go_on():
    said = r"interrupted before the upload was complete; run 'sa-convert push' again"
    with pytest.raises(OutputError, match=said), push_errors(REPO):
        raise KeyboardInterrupt


def test_convert_pushes_what_it_validated(base, recipe, hub, tmp_path):
    hub_options = ("--push-to", "tester/tiny-shared", "--private", "--json")
    result = run_on(hub, tmp_path, "convert", base, "--recipe", recipe, "-o", tmp_path / "out", *hub_options)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told.pop("pushed") == {
        "url": f"{hub.url}/tester/tiny-shared",
        "commit": hub.commits("tester/tiny-shared")[0].sha,
    }
    assert told == json.loads((tmp_path / "out" / "report.json").read_text())
    assert hub.repositories["model", "tester/tiny-shared"].private
    assert set(hub.files("tester/tiny-shared")) == {*digests(tmp_path / "out"), ".gitattributes"}


def test_convert_checks_the_repository_before_the_work(base, recipe, hub, tmp_path):
    arguments = ("convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--push-to", REPO)
    refused(run_on(hub, tmp_path, *arguments, token=READ_TOKEN), 1, "may only read", tmp_path / "out")
    result = run_on(hub, tmp_path, *arguments, "--no-validate")
    assert result.returncode == 2
    assert "does not go with --no-validate" in result.stderr
    assert run_on(hub, tmp_path, *arguments, "--trust-remote-code").returncode == 2
    assert run_on(hub, tmp_path, *arguments[:6], "--private").returncode == 2
    assert nothing_uploaded(hub)
    assert not (tmp_path / "out").exists()


def test_convert_whose_upload_fails_keeps_the_folder(base, recipe, hub, tmp_path):
    hub.fail("POST .*/commit/", times=99, status=503)
    out = tmp_path / "out"
    result = run_on(hub, tmp_path, "convert", base, "--recipe", recipe, "-o", out, "--push-to", REPO, "--json")
    refused(result, 1, re.escape(f"The conversion itself is complete: sa-convert push {out} {REPO}"))
    hub.reset()
    assert run_on(hub, tmp_path, "push", out, REPO).returncode == 0


def test_gate_that_refuses_pushes_nothing(base, hub, tmp_path):
    recipe = write_recipe(tmp_path / "strict.json", OTHER, gate={"max_perplexity_increase": "0%"})
    out = tmp_path / "out"
    refused(
        run_on(hub, tmp_path, "convert", base, "--recipe", recipe, "-o", out, "--push-to", REPO), 3, "perplexity", out
    )
    assert nothing_uploaded(hub)
    assert ("model", REPO) not in hub.repositories


def generated(folder):
    model = load_converted(folder)
    return model.generate(torch.tensor(PROMPT), max_new_tokens=12, do_sample=False)[0].tolist()


ROUND_TRIP = f"""
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

def generate(name):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model, model.generate(torch.tensor({PROMPT}), max_new_tokens=12, do_sample=False)[0].tolist()

card = ModelCard.load("{REPO}")
card.validate()
model, tokens = generate("{REPO}")
tokenizer = AutoTokenizer.from_pretrained("{REPO}", trust_remote_code=True)
model.save_pretrained("saved")
model.push_to_hub("org/again")
tokenizer.push_to_hub("org/again")
report(
    tokens=tokens, saved=generate("saved")[1], again=generate("org/again")[1],
    words=tokenizer.decode(tokenizer("forty words of English").input_ids, skip_special_tokens=True),
    results=[(result.metric_type, result.metric_name, result.metric_value) for result in card.data.eval_results],
)
"""


def test_round_trip_where_sa_convert_is_not_installed(folders, hub, tmp_path):
    """Downloaded into an empty cache by a process that has only torch and transformers; saved and pushed again."""
    assert run_on(hub, tmp_path, "push", folders["a"], REPO).returncode == 0
    found = run_without_sa_convert(ROUND_TRIP, tmp_path, hub.environment(tmp_path / "empty", WRITE_TOKEN))
    expected = generated(folders["a"])
    assert found["tokens"] == found["saved"] == found["again"] == expected
    assert found["words"] == "forty words of English"
    perplexity = json.loads((folders["a"] / "report.json").read_text())["perplexity"]
    assert found["results"] == [
        ["perplexity", "Perplexity", perplexity["after"]],
        ["perplexity", "Perplexity of the base model", perplexity["before"]],
    ]
    again = hub.files("org/again")
    code = expected_code(json.loads(again["config.json"]))
    assert {name: content for name, content in again.items() if name.endswith(".py")} == code


SIDE_BY_SIDE = """
import torch
from transformers import AutoModelForCausalLM
names = {names!r}
models = [AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True) for name in names]
with torch.no_grad():
    logits = [model(torch.tensor({prompt})).logits[0, -1].tolist() for model in models]
report(logits=logits, maps=[model.config.shared_attention["layers"] for model in models])
"""


def test_same_names_side_by_side_in_one_process(folders, hub, tmp_path):
    for place, repo_id in (("a", "org/model"), ("b", "tester/model")):
        assert run_on(hub, tmp_path, "push", folders[place], repo_id).returncode == 0
    names = [str(folders["a"]), "org/model", str(folders["b"]), "tester/model"]
    program = SIDE_BY_SIDE.format(names=names, prompt=PROMPT)
    found = run_without_sa_convert(program, tmp_path, hub.environment(tmp_path / "empty"))
    with torch.no_grad():
        own = [load_converted(folders[place])(torch.tensor(PROMPT)).logits[0, -1] for place in "ab"]
    assert (own[0] - own[1]).abs().max() > 1e-3
    for number, logits in enumerate(found["logits"]):
        torch.testing.assert_close(torch.tensor(logits), own[number // 2], atol=1e-5, rtol=1e-5)
    assert [sorted(layers) for layers in found["maps"]] == [["3"], ["3"], ["2", "4"], ["2", "4"]]


def test_what_was_pushed_can_be_audited_without_its_weights(folders, hub, tmp_path):
    assert run_on(hub, tmp_path, "push", folders["a"], REPO).returncode == 0
    result = run_on(hub, tmp_path / "elsewhere", "audit", REPO, token=READ_TOKEN)
    assert result.returncode == 0, result.stderr
    assert [line.partition("  ")[2] for line in result.stdout.splitlines()] == [
        f"{name}: this version" for name in sorted(hub.files(REPO)) if name.endswith(".py")
    ]
    assert not list((tmp_path / "elsewhere").rglob("*.safetensors"))
    files = hub.files(REPO)
    hub.add_revision(REPO, {**files, "modeling_shared_attention.py": files["modeling_shared_attention.py"] + b"\n"})
    result = run_on(hub, tmp_path / "elsewhere", "audit", REPO, token=READ_TOKEN)
    assert result.returncode == 1
    assert (
        f"Error: {REPO}: its code modeling_shared_attention.py is not what this version of sa-convert writes"
        in result.stderr
    )
