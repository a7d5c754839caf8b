"""An index that does not agree with its files: what is taken is what transformers loads of the same folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.cli_cases import SPAN, refused
from support.loopback_hub import LoopbackHub
from support.processes import run_cli
from support.tiny_models import save_tiny, write_recipe

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, tied in (("untied", False), ("tied", True)):
        save_tiny("llama", folder / name, tie_word_embeddings=tied)
    return folder


class Files:
    """The shards and the index of a folder, as safetensors or as .bin files, to be changed and saved again."""

    def __init__(self, folder: Path, form: str) -> None:
        self.folder, self.form = folder, form
        file = folder / "model.safetensors.index.json"
        names = json.loads(file.read_text())["weight_map"]
        ending = (lambda name: name) if form == "safetensors" else (lambda name: f"pytorch_{Path(name).stem}.bin")
        self.map = {tensor: ending(name) for tensor, name in names.items()}
        self.shards = {ending(name): load_file(folder / name) for name in sorted(set(names.values()))}
        for name in {file.name, *names.values()}:
            (folder / name).unlink()

    @property
    def index(self) -> str:
        return "model.safetensors.index.json" if self.form == "safetensors" else "pytorch_model.bin.index.json"

    def save(self) -> None:
        for name, tensors in self.shards.items():
            if self.form == "safetensors":
                save_file(tensors, self.folder / name, {"format": "pt"})
            else:
                torch.save(tensors, self.folder / name)
        (self.folder / self.index).write_text(json.dumps({"metadata": {}, "weight_map": self.map}))


def names_what_no_file_holds(files):
    first = min(files.shards)
    files.map |= {"mtp.layers.0.weight": first, "model.layers.0.self_attn.rotary_emb.inv_freq": first}


def names_the_head_of_a_tied_model(files):
    files.map["lm_head.weight"] = max(files.shards)


def forgets_a_norm_and_a_projection(files):
    del files.map[NORM], files.map["model.layers.3.mlp.up_proj.weight"]


def forgets_what_the_model_has_no_use_for(files):
    files.shards[min(files.shards)] |= {"mtp.norm.weight": torch.ones(3), "model.layers.0.inv_freq": torch.ones(2)}


def holds_a_norm_twice(files):
    """The copies differ, in the first and in the last file, neither of which the index names."""
    files.shards[min(files.shards)][NORM] = torch.full((64,), 2.0)
    files.shards[max(files.shards)][NORM] = torch.full((64,), 3.0)


def holds_a_projection_twice(files):
    name = "model.layers.1.self_attn.q_proj.weight"
    other = next(file for file in sorted(files.shards, reverse=True) if file != files.map[name])
    files.shards[other][name] = torch.full((128, 64), 0.25)


def names_another_file(files):
    files.map[NORM] = next(file for file in files.shards if file != files.map[NORM])


SITUATIONS = {
    names_what_no_file_holds: (
        "untied",
        "2 tensors are named by {index}, but in no file (such as 'mtp.layers.0.weight')",
    ),
    names_the_head_of_a_tied_model: (
        "tied",
        "1 tensor is named by {index}, but in no file ('lm_head.weight'); left out",
    ),
    forgets_a_norm_and_a_projection: ("untied", "2 tensors are not named by {index}"),
    forgets_what_the_model_has_no_use_for: ("tied", "2 tensors are neither named by {index} nor known to the model"),
    holds_a_norm_twice: ("untied", "1 tensor is in more than one file ('model.norm.weight'); taken from the last"),
    holds_a_projection_twice: ("tied", "1 tensor is in more than one file ('model.layers.1.self_attn.q_proj.weight')"),
    names_another_file: ("untied", None),
}


def prepared(bases, tmp_path, situation, form):
    folder = Path(shutil.copytree(bases / SITUATIONS[situation][0], tmp_path / "model"))
    files = Files(folder, form)
    situation(files)
    files.save()
    return folder, files


def converts_as_loaded(folder, result, out):
    """That the conversion has the weights that transformers loads of the base, and an index that agrees with them."""
    assert result.returncode == 0, result.stderr
    base, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    model, told = AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    expected, found = base.state_dict(), model.state_dict()
    lost = {f"model.layers.3.self_attn.{side}_proj.{part}" for side in "qk" for part in ("weight", "bias")}
    assert set(expected) - set(found) == lost
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    held = {(name, file.name) for file in out.glob("*.safetensors") for name in load_file(file)}
    assert held == set(index.items())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_what_transformers_loads_is_what_is_converted(bases, tmp_path, situation, form):
    folder, files = prepared(bases, tmp_path, situation, form)
    recipe = write_recipe(tmp_path / "span.json", SPAN)
    result = run_cli("convert", folder, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    converts_as_loaded(folder, result, tmp_path / "out")
    note = SITUATIONS[situation][1]
    assert result.stderr.count("Note: ") == (note is not None)
    assert (note or "").format(index=files.index) in result.stderr


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_headers_on_the_hub_are_read_alike(bases, tmp_path, situation):
    folder, files = prepared(bases, tmp_path, situation, "safetensors")
    recipe = write_recipe(tmp_path / "span.json", SPAN)
    with LoopbackHub() as hub:
        hub.add_repo("org/model", {path.name: path.read_bytes() for path in folder.iterdir()})
        environment = hub.environment(tmp_path / "home")
        options = {"env": environment, "cwd": tmp_path}
        told = run_cli("inspect", "org/model", "--json", **options)
        assert told.returncode == 0, told.stderr
        assert (SITUATIONS[situation][1] or "").format(index=files.index) in told.stderr
        assert json.loads(told.stdout)["sharing"]["possible"]
        result = run_cli("convert", "org/model", "--recipe", recipe, "-o", tmp_path / "out", "--no-validate", **options)
    converts_as_loaded(folder, result, tmp_path / "out")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("name", [NORM, "model.layers.5.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.bias"])
def test_a_tensor_that_the_model_needs_and_no_file_holds_is_refused(bases, tmp_path, name, form):
    folder = Path(shutil.copytree(bases / "untied", tmp_path / "model"))
    files = Files(folder, form)
    del files.shards[files.map[name]][name]
    files.save()
    result = run_cli("convert", folder, "--recipe", "late-span", "-o", tmp_path / "out", "--no-validate")
    refused(result, 1, rf"{files.index}: places tensor '{name}' in {files.map[name]}, but no file", tmp_path / "out")
    assert "download" not in result.stderr


def test_weight_files_that_no_index_names_are_said(bases, tmp_path):
    folder = Path(shutil.copytree(bases / "untied", tmp_path / "model"))
    for name in ("model-mtp.safetensors", "extra.safetensors", "consolidated.safetensors"):
        save_file({"mtp.weight": torch.ones(2)}, folder / name)
    result = run_cli("inspect", folder)
    assert result.returncode == 0
    assert (
        "2 files, such as extra.safetensors, are not named by model.safetensors.index.json; left out" in result.stderr
    )


def test_agreeing_files_load_nothing_heavy_and_say_nothing(bases):
    result = run_cli("inspect", bases / "untied")
    assert (result.returncode, result.stderr) == (0, "")
