"""Model folders: what belongs to a model, and every way in which a folder can be wrong."""

import json
import os
import subprocess
import sys

import pytest

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.folder import open_folder
from sa_convert.read.open_model import open_model
from support.make_checkpoint import Fake, tiny_llama, write_raw, write_safetensors


def refused(folder, message, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_model(str(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def change_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_single_and_sharded_folders(tmp_path):
    single = open_folder(tiny_llama(tmp_path / "single"))
    sharded = open_folder(tiny_llama(tmp_path / "sharded", 3), "my-model", "abc")
    assert single.index is None
    assert len(single.shards) == 1
    assert [shard.file.name for shard in sharded.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert set(single.tensors) == set(sharded.tensors) == set(sharded.index["weight_map"])
    assert (single.identity, single.revision) == (str(tmp_path / "single"), None)
    assert (sharded.identity, sharded.revision) == ("my-model", "abc")
    assert sharded.config["model_type"] == "llama"


def test_side_files_are_those_of_the_model_in_subfolders_too(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    kept = ["LICENSE", "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt",
            "tokenizer.json", "additional_chat_templates/rag.jinja", "tokenizer.model", "USE_POLICY.md",
            "original_vocab.txt"]  # fmt: skip
    dropped = ["pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack", "tf_model.h5",
               "rust_model.ot",
               "onnx/model.onnx", "onnx/model.onnx_data", "model-q4.gguf", "x.ckpt", "consolidated.00.pth",
               "consolidated.safetensors", "params.json", "original/params.json", "original/tokenizer.model",
               "modeling_llama.py", ".git/config", ".cache/huggingface/download/x.lock", ".gitattributes", "README.md",
               "optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state_0.pth", "scheduler.pt",
               "runs/a/events.out.tfevents.1", "checkpoint-10/tokenizer.json", "report.json", "recipe.yaml",
               "figures/loss.png", "fp16/model.safetensors.index.json"]  # fmt: skip
    for name in kept + dropped:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "docs").mkdir()
    (folder / "docs" / "README.md").write_text("of a subfolder")
    found = [path.as_posix() for path in open_folder(folder).side_files]
    assert found == sorted([*kept, "docs/README.md"], key=lambda name: name.split("/"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_that_leave_the_folder_are_refused(tmp_path, name):
    folder = tiny_llama(tmp_path / "m")
    secret = tmp_path / "secret"
    (folder / "tokenizer.json").write_text("{}")
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    refused(folder, f"{folder / name}: ")
    refused(folder, "a link that leads out of the model's folder")


def test_links_to_folders_to_nothing_and_in_circles_are_refused(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    link = folder / "extra"
    link.symlink_to(tmp_path / "elsewhere")
    refused(folder, "leads out of the model's folder")
    link.unlink()
    (folder / "inside").mkdir()
    link.symlink_to(folder / "inside")
    refused(folder, "is a link to a folder")
    link.unlink()
    link.symlink_to(folder / "absent")
    refused(folder, "is a link to nothing")
    link.unlink()
    link.symlink_to("extra")
    refused(folder, "is a link to nothing")
    link.unlink()
    os.mkfifo(link)
    refused(folder, "is no regular file")


def test_a_snapshot_of_the_hugging_face_cache_may_link_to_its_own_blobs_alone(tmp_path):
    plain = tiny_llama(tmp_path / "plain", 2)
    (plain / "tokenizer.json").write_text("{}")
    home = tmp_path / "models--org--name"
    commit = "0123456789012345678901234567890123456789"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_folder(snapshot)
    assert checkpoint.revision == commit
    assert [path.name for path in checkpoint.side_files] == ["tokenizer.json"]
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "vocab.json").symlink_to(other / "x")
    refused(snapshot, "leads out of the model's folder")


def test_no_folder_and_no_weights(tmp_path):
    refused(tmp_path / "absent", "there is no such folder or file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is an empty folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file; give the folder")
    folder = tiny_llama(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused(
        folder, "has a config.json but no weights (model.safetensors or model.safetensors.index.json); consolidated."
    )
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    (folder / "x.gguf").write_bytes(b"GGUF")
    refused(folder, f"give the file itself, such as {folder / 'x.gguf'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "config.json: is not JSON (line 1"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "config.json: holds no JSON object"),
        (b"[" * 200_000, "is not JSON"),
    ],
)
def test_config_must_be_a_json_object(tmp_path, text, message):
    folder = tiny_llama(tmp_path / "m")
    (folder / "config.json").write_bytes(text)
    refused(folder, message)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "x\0y"])
def test_an_index_may_not_lead_out_of_the_folder(tmp_path, name):
    folder = tiny_llama(tmp_path / "m", 2)
    write_safetensors(tmp_path / "x.safetensors", {"model.norm.weight": Fake("F32", (1,))})
    change_index(folder, lambda names: names.update({"model.norm.weight": name}))
    refused(folder, "tensor 'model.norm.weight' lies in ")
    refused(folder, "outside of the model's folder")


def test_an_index_that_cannot_be_followed(tmp_path):
    folder = tiny_llama(tmp_path / "a", 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors: the shard that model.safetensors.index.json names for tensor '")
    refused(folder, "is missing")
    folder = tiny_llama(tmp_path / "d", 2)
    change_index(folder, dict.clear)
    refused(folder, "has no 'weight_map'")
    folder = tiny_llama(tmp_path / "e", 2)
    change_index(folder, lambda names: names.update({"lm_head.weight": 3}))
    refused(folder, "names no file for tensor 'lm_head.weight'")
    folder = tiny_llama(tmp_path / "f", 2)
    write_raw(folder / "model-00001-of-00002.safetensors", {}, length=10**8)
    refused(folder, "model-00001-of-00002.safetensors: says its header has 100000000 bytes")


def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path):
    folder = tiny_llama(tmp_path / "m", 2)
    tiny_llama(folder)
    assert open_folder(folder).index is None


def test_an_adapter_is_not_silently_lost(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "merge it into the model first", UnsupportedModelError)


def test_hub_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("org/name@main", "there is no such folder, and the model is not in the cache")
    refused("./org/name", "there is no such folder or file")
    tiny_llama(tmp_path / "org" / "name")
    assert open_model("org/name").identity == "org/name"


def test_reading_headers_loads_no_heavy_library(tmp_path):
    folder = tiny_llama(tmp_path / "m", 2)
    code = (
        "import sys; from sa_convert.read.open_model import open_model; open_model(sys.argv[1]); "
        "print([name for name in ('torch', 'numpy', 'transformers', 'safetensors') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
