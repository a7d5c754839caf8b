"""`sa-convert inspect`, as a process, on folders written here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 32,
}


def write_model(folder: Path, config=None, shared=None, dtype=np.float16, **changes):
    """A folder with attention tensors and an embedding; `shared` leaves out the keys and queries of these layers."""
    config = {**(config or CONFIG), **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": np.zeros((100, 32), np.float32)}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
            if name == "v_proj" or layer not in (shared or ()):
                tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = np.zeros((heads * 8, 32), dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_table(cli, tmp_path):
    result = cli("inspect", write_model(tmp_path / "m"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    table = {label: text.strip() for label, text in lines.items()}
    parameters = 100 * 32 + 4 * (4 + 2 + 2) * 8 * 32
    size = 100 * 32 * 4 + 4 * (4 + 2 + 2) * 8 * 32 * 2
    assert table["Family"] == "llama"
    assert table["Layers"] == "4"
    assert table["Query heads"] == "4 per layer"
    assert table["KV groups"] == "2 per layer, 8 in all"
    assert table["Head size"] == "8"
    assert table["Attention"] == "full, all layers"
    assert table["Tensors"] == "13 in 1 file"
    assert table["Parameters"] == f"11.4 k ({parameters:,})"
    assert table["Size"] == f"29.2 kB ({size:,} bytes)"
    assert table["Data types"] == "F16 (71.9%), F32 (28.1%)"
    # 4 layers, keys and values, 2 groups of 8 halves
    assert table["Cache per token"] == f"{4 * 2 * 2 * 8 * 2} bytes in the data type of the weights"
    assert table["Can share"] == "yes, by query head"
    assert "layers 1-3 can borrow from earlier ones of this kind; layer 0 cannot" in result.stdout
    assert table["At most"] == "6 of 8 KV groups can lose their keys (75.0%)"


def test_json_is_the_only_output(cli, tmp_path):
    result = cli("inspect", "--json", write_model(tmp_path / "m"))
    content = json.loads(result.stdout)
    assert content["layers"] == 4
    assert content["checkpoint_bytes"] == 29184
    assert content["cache_bytes_per_token"] == 256
    assert content["dtypes"] == {"F16": 8192, "F32": 3200}
    assert content["granularity"] == "head"
    assert [layer["layer"] for layer in content["attention"]] == ["0", "1", "2", "3"]
    assert content["stacks"] == {}
    sharing = content["sharing"]
    assert (sharing["possible"], sharing["reason"]) == (True, None)
    assert (sharing["total_groups"], sharing["shareable_groups"]) == (8, 6)
    assert sharing["layers_without_source"] == {"0": "no earlier layer of its kind"}
    assert (sharing["kinds"][0]["stack"], sharing["kinds"][0]["reusing"]) == ("", [1, 2, 3])


@pytest.mark.parametrize(
    ("changes", "attention", "reach"),
    [
        (
            {"model_type": "gemma2", "num_hidden_layers": 8, "sliding_window": 512},
            "0 sliding(512), 1 full, and so on every 2 layers",
            ["sliding(512): layers 2, 4, 6 can borrow", "full: layers 3, 5, 7 can borrow", "layer 1 cannot"],
        ),
        (
            {
                "model_type": "mistral",
                "num_hidden_layers": 4,
                "sliding_window": 64,
                "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            },
            "0-2 sliding(64), 3 full",
            ["sliding(64): layers 1-2 can borrow", "full: layer 3 cannot, no earlier layer is of its kind"],
        ),
    ],
)
def test_layers_share_only_with_their_kind(cli, tmp_path, changes, attention, reach):
    architecture = {"gemma2": "Gemma2ForCausalLM", "mistral": "MistralForCausalLM"}[changes["model_type"]]
    output = cli("inspect", write_model(tmp_path / "m", architectures=[architecture], **changes)).stdout
    assert f"  {attention}\n" in output
    for text in reach:
        assert text in output


def test_no_layer_can_share(cli, tmp_path):
    output = cli("inspect", write_model(tmp_path / "m", num_hidden_layers=1)).stdout
    assert "Can share        no: Every layer is the only one of its kind" in output


def test_an_unsupported_family_is_still_described(cli, tmp_path):
    folder = write_model(tmp_path / "m", model_type="mamba", architectures=["MambaForCausalLM"])
    result = cli("inspect", folder)
    assert result.returncode == 0
    assert "Family           none that can be converted" in result.stdout
    assert "Layers           4" in result.stdout
    assert "Cache per token  unknown" in result.stdout
    assert "Can share        no: Models of type 'mamba' are not supported" in result.stdout
    content = json.loads(cli("inspect", folder, "--json").stdout)
    assert (content["family"], content["layers"], content["tensors"]) == (None, 4, 13)
    assert content["sharing"]["reason"].startswith("Models of type 'mamba' are not supported")
    assert content["sharing"]["possible"] is False


def test_a_converted_model_says_so(cli, tmp_path):
    rows = {"2": [[1, 0], [1, 1], [1, 2], [1, 3]], "3": [[1, 0], [1, 1], None, None]}
    folder = write_model(
        tmp_path / "m", shared=[2], model_type="shared_attention_llama", shared_attention={"layers": rows}
    )
    output = cli("inspect", folder).stdout
    assert "Family           llama" in output
    assert "Shares already   3 of 8 KV groups, in layers 2-3" in output
    assert "Can share        no: The model shares attention already" in output
    # 8 groups of values, 5 of keys, 8 halves each
    assert f"Cache per token  {(8 + 5) * 8 * 2} bytes" in output
    content = json.loads(cli("inspect", folder, "--json").stdout)
    assert content["sharing"]["layers"] == rows
    assert (content["sharing"]["reused_groups"], content["sharing"]["shareable_groups"]) == (3, 0)


def test_broken_models_are_an_error(cli, tmp_path):
    folder = write_model(tmp_path / "m", num_hidden_layers=4)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 9}))
    for model, word in ((tmp_path / "nothing", "nothing"), (folder, "'model.layers.4.self_attn.q_proj.weight'")):
        result = cli("inspect", model)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert word in result.stderr
        assert result.stderr.count("\n") == 1


def test_reads_headers_only(tmp_path):
    folder = write_model(tmp_path / "m")
    program = (
        "import sys; from sa_convert.commands.main import run; status = run(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'pydantic'} & set(sys.modules)), file=sys.stderr);"
        "sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    begin = time.monotonic()
    command = [sys.executable, "-c", program, "inspect", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode == 0
    assert result.stderr == "[]\n"
    assert time.monotonic() - begin < 2
