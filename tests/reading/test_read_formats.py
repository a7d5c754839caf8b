"""Legacy .bin checkpoints and .gguf files: the same model as safetensors, and never code from a pickle."""

import importlib.util
import json
import pickle
from pathlib import Path

import pytest

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read import gguf as gguf_module
from sa_convert.read.open_model import open_model
from support.make_checkpoint import tiny_llama

torch = pytest.importorskip("torch")


def bin_folder(folder, parts, **config):
    """A folder with these state dicts as .bin files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text("{}")
    if len(parts) == 1:
        torch.save(parts[0], folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"pytorch_model-{number:05}-of-{len(parts):05}.bin"
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def state(*dtypes):
    torch.manual_seed(1)
    return {f"w.{dtype}": (torch.randn(6, 4) * 100).to(getattr(torch, dtype)) for dtype in dtypes}


def described(checkpoint):
    return {name: (entry.dtype, entry.shape, entry.bytes) for name, entry in checkpoint.tensors.items()}


def loaded(checkpoint):
    from safetensors.torch import load_file

    return {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard.file).items()}


def refused(folder, message, error=CheckpointError):
    for workspace in (None, folder.parent / "workspace"):
        with pytest.raises(error) as caught:
            open_model(str(folder), workspace)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_dtype_comes_through_bit_for_bit(tmp_path):
    dtypes = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
              "int8", "uint8", "bool", "complex64", "uint16", "uint32"]  # fmt: skip
    tensors = state(*dtypes) | {"scalar": torch.tensor(3.0), "turned": torch.arange(12.0).reshape(3, 4).T}
    folder = bin_folder(tmp_path / "m", [tensors])
    seen = open_model(str(folder))
    written = open_model(str(folder), tmp_path / "workspace")
    assert described(seen) == described(written)
    assert [shard.file.name for shard in written.shards] == ["model.safetensors"]
    assert (written.identity, written.index) == (str(folder), None)
    assert [path.name for path in written.side_files] == ["tokenizer.json"]
    for name, tensor in loaded(written).items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.reshape(-1).view(torch.uint8).equal(tensors[name].contiguous().reshape(-1).view(torch.uint8))


def test_shards_keep_their_layout(tmp_path):
    first, second = state("float32", "float16"), state("bfloat16", "int64")
    folder = bin_folder(tmp_path / "m", [first, second])
    written = open_model(str(folder), tmp_path / "workspace")
    assert [shard.file.name for shard in written.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert set(written.tensors) == set(first) | set(second)
    assert described(open_model(str(folder))) == described(written)
    assert list(folder.glob("*.safetensors")) == []


@pytest.mark.parametrize("legacy", [False, True])
def test_tied_tensors(tmp_path, legacy):
    embed = torch.randn(6, 4)
    tensors = {"embed": embed, "lm_head": embed, "part": embed[2:4], "odd": embed.T}
    for name, config, kept in (
        ("tied", {"tie_word_embeddings": True}, {"embed", "part", "odd"}),
        ("untied", {"tie_word_embeddings": False}, {"embed", "lm_head", "part", "odd"}),
        ("llama", {}, {"embed", "lm_head", "part", "odd"}),
        ("gemma", {"model_type": "gemma"}, {"embed", "part", "odd"}),
    ):
        folder = bin_folder(tmp_path / name, [tensors], **config)
        if legacy:
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        written = open_model(str(folder), tmp_path / f"w-{name}")
        assert set(written.tensors) == kept
        assert described(open_model(str(folder))) == described(written)
        for key, tensor in loaded(written).items():
            assert tensor.equal(tensors[key])


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_in_a_pickle_is_never_run(tmp_path, form):
    mark = tmp_path / "executed"
    folder = bin_folder(tmp_path / "m", [{}])
    content = {"w": torch.ones(2), "x": Evil(mark)}
    file = folder / "pytorch_model.bin"
    if form == "bare":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    refused(folder, "holds more than weights, and loading the rest could run code, so it is not loaded")
    assert not mark.exists()
    torch.load(file, weights_only=False) if form != "bare" else pickle.loads(file.read_bytes())
    assert mark.exists(), "the test's pickle does nothing"


def test_damaged_and_strange_files(tmp_path):
    folder = bin_folder(tmp_path / "m", [state("float32")])
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for data in (b"", b"hello"):
        file.write_bytes(data)
        refused(folder, f"{file}: is not a PyTorch checkpoint")
    for data in (whole[: len(whole) // 2], b"PK\x03\x04" + bytes(100)):
        file.write_bytes(data)
        refused(folder, f"{file}: is a PyTorch checkpoint that is cut; download it again")
    torch.save([1, 2], file)
    refused(folder, "holds a list in place of named tensors")
    torch.save({"model": {"w": torch.ones(2)}}, file)
    refused(folder, "'model' is no plain tensor but a dict")
    torch.save({"w": torch.ones(2).to_sparse()}, file)
    refused(folder, "'w' is no plain tensor")
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, file)
    refused(folder, "tensor 'w' has the dtype torch.complex128, which safetensors does not know")
    torch.save({}, file)
    refused(folder, "its .bin files hold no tensors")
    file.unlink()
    file.symlink_to("/etc/hostname")
    refused(folder, "leads out of the model's folder")


def test_an_index_may_not_lead_out_of_the_folder(tmp_path):
    folder = bin_folder(tmp_path / "m", [state("float32"), state("float16", "int8")])
    index_file = folder / "pytorch_model.bin.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["other"] = "../x.bin"
    index_file.write_text(json.dumps(index))
    refused(folder, "outside of the model's folder")


def test_safetensors_come_first(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert open_model(str(folder), tmp_path / "w").shards[0].file == folder / "model.safetensors"
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """A small Llama with random float32 weights, as llama.cpp names and orders them."""
    gguf = pytest.importorskip("gguf")
    import numpy

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    hidden, heads, groups, inner, layers = 32, 4, 2, 64, 2
    tokens = ["<unk>", "<s>", "</s>", "t", "1", "t1", *(f"u{index}" for index in range(34))]
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = numpy.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (len(tokens), hidden),
    }
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (hidden,), f"blk.{layer}.ffn_norm.weight": (hidden,),
            f"blk.{layer}.attn_q.weight": (hidden, hidden), f"blk.{layer}.attn_output.weight": (hidden, hidden),
            f"blk.{layer}.attn_k.weight": (groups * 8, hidden), f"blk.{layer}.attn_v.weight": (groups * 8, hidden),
            f"blk.{layer}.ffn_gate.weight": (inner, hidden), f"blk.{layer}.ffn_up.weight": (inner, hidden),
            f"blk.{layer}.ffn_down.weight": (hidden, inner),
        }  # fmt: skip
    tensors = {name: random.standard_normal(shape, dtype=numpy.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, tensors


def test_gguf_is_written_as_the_model_that_it_holds(tmp_path, tiny_gguf):
    file, tensors = tiny_gguf
    seen = open_model(str(file))
    written = open_model(str(file), tmp_path / "w")
    assert described(seen) == described(written)
    assert seen.config.items() <= written.config.items()  # transformers adds its defaults
    assert seen.config["model_type"] == "llama"
    assert written.identity == seen.identity == str(file)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {
        path.name for path in written.side_files
    }
    weights = loaded(written)
    value = weights["model.layers.1.self_attn.v_proj.weight"]
    assert value.equal(torch.from_numpy(tensors["blk.1.attn_v.weight"]))
    # llama.cpp keeps the two halves of a head's rotary pairs side by side; transformers one after the other.
    query = torch.from_numpy(tensors["blk.1.attn_q.weight"]).reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(32, 32)
    assert weights["model.layers.1.self_attn.q_proj.weight"].equal(query)
    assert weights["lm_head.weight"].equal(torch.from_numpy(tensors["output.weight"]))


def test_gguf_dtype(tmp_path, tiny_gguf):
    written = open_model(str(tiny_gguf[0]), tmp_path / "w", "bfloat16")
    assert {entry.dtype for entry in written.tensors.values()} == {"BF16"}
    assert described(open_model(str(tiny_gguf[0]), None, "bfloat16")) == described(written)


def test_wrong_gguf_files(tmp_path, tiny_gguf, monkeypatch):
    data = tiny_gguf[0].read_bytes()
    file = tmp_path / "x.gguf"
    refused(file, "there is no such file")
    file.write_bytes(b"GGML" + data[4:])
    refused(file, "is not a GGUF file, or damaged")
    for cut in (data[:30], data[: len(data) // 20], data[: -len(data) // 2]):
        file.write_bytes(cut)
        refused(file, "download it again")
    file.write_bytes(data.replace(b"llama", b"klaun"))
    refused(file, "klaun", UnsupportedModelError)
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(data)
    refused(part, "is one of 3 parts of a model; join them with llama-gguf-split --merge", UnsupportedModelError)
    monkeypatch.setattr(
        gguf_module, "find_spec", lambda name: None if name == "gguf" else importlib.util.find_spec(name)
    )
    refused(tiny_gguf[0], "pip install 'sa-convert[gguf]'", UnsupportedModelError)


def test_the_model_card_comes_along_for_ours_to_quote(tmp_path):
    folder = bin_folder(tmp_path / "m", [state("float32")])
    (folder / "README.md").write_text("card")
    written = open_model(str(folder), tmp_path / "w")
    assert (written.folder / "README.md").read_text() == "card"
    assert Path("README.md") not in written.side_files
