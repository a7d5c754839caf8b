"""Files that say odd things: each is refused with the true reason, or shown as what it is. `make fuzz` found them."""

import json
import time

import pytest

from sa_convert.console.printable import LONGEST, one_line, printable
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.families.table import FAMILIES
from sa_convert.present.files.card_metadata import inherited
from sa_convert.read.folder import open_folder, read_json
from sa_convert.read.geometry_of import attention_kinds
from sa_convert.read.header import read_shard
from sa_convert.read.model_of import model_of
from sa_convert.rewrite.shards import write_shards
from support.cli_cases import edit_json, refused
from support.make_checkpoint import tiny_llama, write_raw
from support.processes import run_cli

RECIPE = "sharing: {spans: [{layers: 3, source: 2}]}\n"


def said(folder):
    with pytest.raises(CheckpointError) as error:
        model_of(open_folder(folder))
    return str(error.value)


@pytest.mark.parametrize("depth", [40, 2**31, 2**53 + 1, 10**30])
def test_more_layers_than_tensors_are_refused_at_once(tmp_path, depth):
    folder = tiny_llama(tmp_path / "m")
    edit_json(folder / "config.json", num_hidden_layers=depth)
    began = time.monotonic()
    assert f"config.json counts {depth} layers, but the checkpoint has only 39 tensors" in said(folder)
    assert time.monotonic() - began < 5


def test_more_layers_than_there_are_but_fewer_than_tensors(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    edit_json(folder / "config.json", num_hidden_layers=39)
    assert "no tensor 'model.layers.4.self_attn.q_proj.weight', though config.json counts 39 layers" in said(folder)


@pytest.mark.parametrize(
    ("model_type", "changes", "told"),
    [
        ("gemma3_text", {"layer_types": 7}, "'layer_types' should be a list of names"),
        ("gemma3_text", {"layer_types": ["full_attention", 3, None, "x"]}, "'layer_types' should be a list"),
        ("qwen3", {"layer_types": {"0": "full_attention"}}, "'layer_types' should be a list of names"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "'sliding_window_pattern' should be a positive whole number"),
        ("exaone4", {"sliding_window_pattern": ""}, "'sliding_window_pattern' should be a positive whole number"),
        ("modernbert", {"global_attn_every_n_layers": ""}, "'global_attn_every_n_layers' should be a positive"),
        ("modernbert", {"global_attn_every_n_layers": 2.5}, "'global_attn_every_n_layers' should be a positive"),
        ("mistral", {"sliding_window": "4096"}, "'sliding_window' should be a positive whole number, but is '4096'"),
        ("modernbert", {"local_attention": [1]}, "'local_attention' should be a positive whole number, but is [1]"),
        ("gpt_oss", {"sliding_window": -1}, "'sliding_window' should be a positive whole number, but is -1"),
        ("llama4_text", {"no_rope_layers": 3}, "'no_rope_layers' should be a list of values"),
        ("smollm3", {"no_rope_layer_interval": 0}, "'no_rope_layer_interval' should be a positive whole number"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "x"},
         "'max_window_layers' should be a whole number from 0, but is 'x'"),
    ],
)  # fmt: skip
def test_values_of_config_json_of_another_kind(model_type, changes, told):
    with pytest.raises(CheckpointError) as error:
        attention_kinds(changes, FAMILIES[model_type], 4)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"sliding_window": "odd", "max_window_layers": "odd", "sliding_window_pattern": 0}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": "odd", "max_window_layers": "odd"}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4, "sliding_window": "odd", "sliding_window_pattern": 0}),
    ],
)
def test_values_that_mean_nothing_to_a_model_may_be_odd(model_type, changes):
    kinds = attention_kinds(changes, FAMILIES[model_type], 4)
    assert [kind[:2] for kind in kinds] == [("full_attention", None)] * 4


@pytest.mark.parametrize("named", [0.5, 3, True, "LlamaForCausalLM", {"a": 1}])
def test_architectures_that_are_no_list(tmp_path, named):
    folder = tiny_llama(tmp_path / "m")
    edit_json(folder / "config.json", architectures=named)
    assert f"config.json: 'architectures' should be a list of class names, but is {named!r}" in said(folder)


@pytest.mark.parametrize("head_dim", ["8", 2.5, [8], True])
def test_head_size_of_a_fused_projection(tmp_path, head_dim):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "phi3", "num_attention_heads": 4, "num_hidden_layers": 1, "head_dim": head_dim})
    )
    name = "model.layers.0.self_attn.qkv_proj.weight"
    header = {name: {"dtype": "F32", "shape": [96, 32], "data_offsets": [0, 96 * 32 * 4]}}
    write_raw(folder / "model.safetensors", header, bytes(96 * 32 * 4))
    assert f"'head_dim' should be a positive whole number, but is {head_dim!r}" in said(folder)


@pytest.mark.parametrize("side", ["q", "k"])
def test_projections_without_rows(tmp_path, side):
    folder = tiny_llama(tmp_path / "m")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, position = json.loads(data[8 : 8 + length]), 0
    header.pop("__metadata__")
    header[f"model.layers.1.self_attn.{side}_proj.weight"]["shape"] = [0, 32]
    for entry in header.values():
        size = entry["data_offsets"][1] - entry["data_offsets"][0] if 0 not in entry["shape"] else 0
        entry["data_offsets"] = [position, position + size]
        position += size
    write_raw(file, header, bytes(position))
    with pytest.raises(
        UnsupportedModelError, match=rf"layers\.1\.self_attn\.{side}_proj\.weight' is empty \(shape \[0, 32\]"
    ):
        model_of(open_folder(folder))


HALF = r"\ud83d"
WHOLE = r"\ud83d\ude00"


@pytest.mark.parametrize("text", ['{"a": "HALF"}', '{"a": ["x HALF y"]}', '{"HALF": 1}'])
@pytest.mark.parametrize("half", [HALF, HALF.replace("d8", "D8"), r"\ude00", r"\ude00\ud83d"])
def test_half_of_a_character_is_refused_before_anything_is_written(tmp_path, text, half):
    file = tmp_path / "config.json"
    file.write_text(text.replace("HALF", half))
    with pytest.raises(CheckpointError, match=r"config\.json: holds half of a character, which is no text"):
        read_json(file)
    file.write_text(text.replace("HALF", WHOLE))
    assert "\U0001f600" in str(read_json(file))


def test_half_of_a_character_in_a_header(tmp_path):
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    write_raw(tmp_path / "m.safetensors", f'{{"{HALF}": {entry}}}'.encode(), bytes(4))
    with pytest.raises(CheckpointError, match="the header is not a JSON object"):
        read_shard(tmp_path / "m.safetensors")
    write_raw(tmp_path / "m.safetensors", f'{{"{WHOLE}": {entry}}}'.encode(), bytes(4))
    assert [tensor.name for tensor in read_shard(tmp_path / "m.safetensors").tensors] == ["\U0001f600"]


@pytest.mark.parametrize("metadata", [0.5, [1], "x", None, {}])
def test_metadata_of_an_index_that_is_no_object(tmp_path, metadata):
    """Nothing in it is needed."""
    folder = tiny_llama(tmp_path / "m", shards=3)
    edit_json(folder / "model.safetensors.index.json", metadata=metadata)
    checkpoint = open_folder(folder)
    (tmp_path / "out").mkdir()
    written = write_shards(checkpoint, {}, tmp_path / "out", lambda count: None)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": written.tensor_bytes}
    assert set(index["weight_map"]) == set(checkpoint.tensors)


def test_a_card_nested_too_deeply(tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: {'[' * 5000}\n---\ntext\n")
    found, remark = inherited(tmp_path / "README.md", None, tmp_path)
    assert found == {}
    assert remark.startswith("The metadata of the base model's card cannot be read.")


def test_printable():
    assert printable("naïve 模型 \U0001f600 /a b") == "naïve 模型 \U0001f600 /a b"
    assert printable("\x1b[31m\x00\u202e\ud800\x9b") == r"\x1b[31m\x00\u202e\ud800\x9b"
    assert one_line("a\n b\t c\r\nd") == "a b c d"
    long = one_line("start " + "x" * 100_000 + " end: do this.")
    assert len(long) == LONGEST
    assert long.startswith("start x")
    assert long.endswith("x end: do this.")


def test_the_longest_message_of_ours_is_whole(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    edit_json(folder / "config.json", model_type="no_such_type")
    result = run_cli("inspect", folder)
    assert f"Supported types: {', '.join(sorted(FAMILIES))}" in str(result.stderr + result.stdout)


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_names_in_files_cannot_write_to_the_terminal(tmp_path, command):
    """Escape codes that hide what follows, and text that runs backwards."""
    folder, recipe, out = tiny_llama(tmp_path / "m"), tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    edit_json(folder / "config.json", model_type="\x1b[8mllama\u202e")
    if command == "convert":
        result = run_cli(command, folder, "--recipe", recipe, "-o", out, "--no-validate")
        refused(result, 1, r"Models of type '\\x1b\[8mllama\\u202e' are not supported", out)
    else:
        result = run_cli(command, folder)
        assert result.returncode == 0
        assert r"\x1b[8mllama\u202e" in result.stdout
    assert not {"\x1b", "\u202e"} & {*result.stdout, *result.stderr}


def test_names_too_long_for_any_file(tmp_path):
    """Of a shard that an index names, and of the model."""
    folder = tiny_llama(tmp_path / "m", 2)
    long = "x" * 300
    file = folder / "model.safetensors.index.json"
    names = json.loads(file.read_text())["weight_map"]
    edit_json(file, weight_map={**names, next(iter(names)): f"{long}.safetensors"})
    assert f"{long}.safetensors: the shard that model.safetensors.index.json names for tensor" in said(folder)
    for name in (long, f"{long}/{long}", f"./{long}"):
        refused(run_cli("inspect", name), 1, long)
