"""`sa-convert audit`, and folders that earlier versions wrote: they load, and every command takes them."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from sa_convert.present.hub.complete import complete_conversion
from support.cli_cases import refused
from support.converted_folder import convert_tiny
from support.processes import run_cli
from support.tiny_models import load_converted
from support.validation_models import save_base, save_converted
from support.version_1 import make_version_1


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert_tiny(tmp_path_factory.mktemp("audit"), "llama", "groups")


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted.folder, tmp_path / "out")


def test_a_folder_as_it_was_written(folder):
    done = run_cli("audit", folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = sorted(path.name for path in folder.glob("*.py"))
    assert [line.split()[1] for line in lines] == [f"{name}:" for name in names]
    assert all(line.endswith(": this version") for line in lines)
    sums = [hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in names]
    assert [line.split()[0] for line in lines] == sums


def change(folder):
    file = folder / "shared_attention_share.py"
    file.write_text(file.read_text() + "\n")
    return r"out: its code shared_attention_share\.py is not what this version of sa-convert writes"


def add(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("")
    return r"out: its code custom_generate/generate\.py is not what this version of sa-convert writes"


def remove(folder):
    (folder / "modeling_shared_attention.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": config["auto_map"]["AutoConfig"]}
    (folder / "config.json").write_text(json.dumps(config))
    return r"out: its code modeling_shared_attention\.py is missing"


def name_other_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling.Model"
    (folder / "config.json").write_text(json.dumps(config))
    return r"out: config\.json names code of its own \('someone/else--modeling\.Model' under auto_map\)"


def another_family(folder):
    """Code is of a family: the lines that name classes differ."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "shared_attention_qwen2"}))
    return r"out: its code configuration_shared_attention\.py is not what this version of sa-convert writes"


@pytest.mark.parametrize("harm", [change, add, remove, name_other_code, another_family])
def test_a_folder_that_was_changed(folder, harm):
    said = harm(folder)
    done = run_cli("audit", folder)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert re.search(said, done.stderr), done.stderr
    found = json.loads(run_cli("audit", folder, "--json").stdout)
    assert found["passed"] is False
    assert re.search(said.removeprefix("out: "), found["fault"])


def test_a_base_model_has_no_code_of_ours(converted):
    refused(run_cli("audit", converted.base_folder), 1, "base: is no converted model")


@pytest.mark.parametrize("commit", ["135c47d", "d015eaa"])
def test_listed_earlier_versions(converted, folder, commit):
    make_version_1(folder, converted.base_folder, commit)
    done = run_cli("audit", folder)
    assert done.returncode == 0, done.stderr
    assert all(line.endswith(f": config version 1, {commit}") for line in done.stdout.splitlines())
    (folder / "shared_attention.py").unlink()
    assert "shared_attention.py is missing" in run_cli("audit", folder).stderr


@torch.no_grad()
def test_a_folder_of_version_1_loads_by_its_code_and_by_the_package(converted, folder):
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = load_converted(folder)(ids).logits
    make_version_1(folder, converted.base_folder)
    torch.testing.assert_close(load_converted(folder)(ids).logits, expected)
    program = (
        "import sys, torch, sa_convert, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert type(model).__module__ == 'sa_convert.treated_classes', type(model)\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "torch.save(model(ids).logits.detach(), sys.argv[3])\n"
        "model.save_pretrained(sys.argv[4])\n"
    )
    again = folder.parent / "again"
    arguments = [folder, ids.tolist(), folder.parent / "logits.pt", again]
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(folder.parent / "logits.pt"), expected)
    # What the package saves is of version 2.
    assert run_cli("audit", again).returncode == 0
    assert json.loads((again / "config.json").read_text())["shared_attention"]["version"] == 2
    torch.testing.assert_close(load_converted(again)(ids).logits, expected)


def test_commands_take_a_folder_of_version_1(tmp_path):
    base = save_base(tmp_path / "base")
    folder = save_converted(base, tmp_path / "converted")
    now = run_cli("evaluate", folder, "--against", base, "--sequences", 2, "--length", 64, "--json")
    make_version_1(folder, base)
    then = run_cli("evaluate", folder, "--against", base, "--sequences", 2, "--length", 64, "--json")
    assert (now.returncode, then.returncode) == (0, 0), now.stderr + then.stderr
    assert json.loads(then.stdout) == json.loads(now.stdout)
    assert run_cli("inspect", folder, "--json").returncode == 0
    few = ("--contexts", "12", "--batches", 1, "--new-tokens", 2, "--repeats", 1)
    done = run_cli("bench", folder, "--against", base, *few)
    assert done.returncode == 0, done.stderr


def test_a_folder_of_version_1_can_be_pushed(converted, folder):
    make_version_1(folder, converted.base_folder)
    files = {path.name for path in complete_conversion(folder, allow_unvalidated=True).files}
    assert {"shared_attention_families.py", "modeling_shared_attention.py", "config.json"} <= files
