"""Weights that transformers would not load for their type are refused by the reason that is true of them."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.family_of import family_of
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.rewrite.config import converted_config
from support.cli_cases import edit_json, refused
from support.loopback_hub import LoopbackHub
from support.make_checkpoint import Fake, llama_config, llama_tensors, write_model
from support.processes import run_cli
from support.tiny_models import save_tiny

CONFIG = llama_config(4, 32, 4, 2, 64, 48)
LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")
ATTENTION = re.compile(r"layers\.\d+\.self_attn\.\w+_proj\.weight$")
MLP = re.compile(r"layers\.\d+\.mlp\.\w+_proj\.weight$")


def replaced(pattern, parts, base=None):
    """The tensors of a Llama, those that match in parts: their dtypes by the ends of their names."""
    tensors = {}
    for name, fake in (base or llama_tensors(CONFIG)).items():
        if pattern.search(name):
            start = name.removesuffix("weight")
            tensors |= {f"{start}{part}": Fake(dtype, (8, 8)) for part, dtype in parts.items()}
        else:
            tensors[name] = fake
    return tensors


def renamed(pattern, new):
    return {re.sub(pattern, new, name): fake for name, fake in llama_tensors(CONFIG).items()}


GPTQ = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}
AWQ = {"qweight": "I32", "qzeros": "I32", "scales": "F16"}
PACKED = {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"}
HQQ = {"W_q": "U8", "scale": "F32", "zero": "F32"}
NF4 = {"weight": "U8", "weight.absmax": "U8", "weight.quant_map": "F32", "weight.quant_state.bitsandbytes__nf4": "U8"}
INT8 = {"weight": "I8", "SCB": "F32", "weight_format": "U8"}
FP8 = {"weight": "F8_E4M3", "weight_scale_inv": "F32"}
QUANTO = {"weight._data": "I8", "weight._scale": "F32"}
PLAIN: dict = {}

REFUSED = {
    "gptq": (replaced(LINEAR, GPTQ), {"quant_method": "gptq", "bits": 4}, "quantised by GPTQ ('model.layers.0"),
    "gptq, not said": (replaced(LINEAR, GPTQ), None, "projections are quantised by GPTQ"),
    "gptq, attention alone": (replaced(ATTENTION, GPTQ), {"quant_method": "gptq"}, "projections are quantised by GPTQ"),
    "awq": (replaced(LINEAR, AWQ), {"quant_method": "awq"}, "projections are quantised by AWQ"),
    "compressed-tensors": (replaced(LINEAR, PACKED), {"quant_method": "compressed-tensors"}, "by compressed-tensors"),
    "hqq": (replaced(LINEAR, HQQ), {"quant_method": "hqq"}, "projections are quantised by HQQ"),
    "nf4": (replaced(LINEAR, NF4), {"quant_method": "bitsandbytes", "load_in_4bit": True}, "by bitsandbytes"),
    "nf4, not said": (replaced(LINEAR, NF4), None, "projections are quantised"),
    "int8": (replaced(LINEAR, INT8), {"load_in_8bit": True}, "projections are quantised by bitsandbytes"),
    "fp8": (replaced(LINEAR, FP8), {"quant_method": "fp8"}, "projections are quantised by FP8"),
    "quanto": (replaced(LINEAR, QUANTO), {"quant_method": "quanto"}, "projections are quantised by Quanto"),
    "unknown method": (replaced(LINEAR, {"blob": "U8"}), {"quant_method": "new"}, "projections are quantised by new"),
    "left over": (PLAIN, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "remove 'quantization_config' from"),
    "left over, gptq": (PLAIN, {"quant_method": "gptq", "bits": 4}, "with 'quant_method' gptq (GPTQ), but no tensor"),
    "left over, awq": (PLAIN, {"quant_method": "awq"}, "with 'quant_method' awq (AWQ), but no tensor is quantised"),
    "left over, packed": (PLAIN, {"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "no tensor is q"),
    "left over, no method": (PLAIN, {"bits": 4}, "with no 'quant_method', but no tensor is quantised"),
    "compiled": (renamed("^", "_orig_mod."), None, "has '_orig_mod.' in its name, from torch.compile (save its"),
    "compiled inside": (renamed(r"\.mlp\.", ".mlp._orig_mod."), None, "has '_orig_mod.' in its name"),
    "distributed": (renamed("^", "module."), None, "has 'module.' in its name, from DistributedDataParallel"),
    "fsdp": (renamed("^", "_fsdp_wrapped_module."), None, "has '_fsdp_wrapped_module.' in its name, from FSDP"),
    "checkpointed": (renamed(r"(layers\.\d)", r"\1._checkpoint_wrapped_module"), None, "from activation checkpointing"),
    "lora": (renamed(r"q_proj\.", "q_proj.base_layer."), None, "unmerged adapter (LoRA, PEFT)"),
    "lora of the feed-forward part": (renamed(r"up_proj\.", "up_proj.base_layer."), None, "call merge_and_unload()"),
    "trained embeddings": (renamed(r"(embed_tokens)\.", r"\1.modules_to_save.default."), None, "unmerged adapter"),
    "empty": (
        {name: Fake("BF16", fake.shape if "norm" in name else (0,)) for name, fake in llama_tensors(CONFIG).items()},
        None,
        "DeepSpeed ZeRO-3",
    ),
    "empty, head alone": ({**llama_tensors(CONFIG), "lm_head.weight": Fake("BF16", (0,))}, None, "empty (shape [0])"),
    "empty, two dimensions": (
        {**llama_tensors(CONFIG), "model.layers.1.mlp.up_proj.weight": Fake("BF16", (0, 32))}, None, "zero_to_fp32.py",
    ),
}  # fmt: skip


def saved(folder, case, shards=None):
    tensors, quantisation, _ = REFUSED[case]
    config = {**CONFIG, **({"quantization_config": quantisation} if quantisation else {})}
    return write_model(folder, config, tensors or llama_tensors(CONFIG), shards)


def as_bin(folder):
    """The same folder with a .bin file."""
    words = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "I32": "int32", "I64": "int64", "U8": "uint8",
             "I8": "int8", "F8_E4M3": "float8_e4m3fn"}  # fmt: skip
    found = open_model(str(folder)).tensors.values()
    state = {entry.name: torch.zeros(entry.shape, dtype=getattr(torch, words[entry.dtype])) for entry in found}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
@pytest.mark.parametrize("case", REFUSED)
def test_the_reason_is_told(tmp_path, case, form):
    folder = saved(tmp_path / "m", case, 3 if form == "sharded" else None)
    folder = as_bin(folder) if form == "bin" else folder
    with pytest.raises(UnsupportedModelError) as caught:
        model_of(open_model(str(folder)))
    told = str(caught.value)
    assert REFUSED[case][2] in told
    assert "\n" not in told
    assert "download" not in told


@pytest.mark.parametrize("case", ["gptq", "left over", "compiled", "lora", "empty"])
def test_on_the_command_line_and_on_the_hub(tmp_path, case):
    folder = saved(tmp_path / "m", case, 2)
    pattern = re.escape(REFUSED[case][2])
    options = ("--recipe", "late-span", "-o", tmp_path / "out", "--no-validate")
    refused(run_cli("convert", folder, *options), 1, pattern, tmp_path / "out")
    with LoopbackHub() as hub:
        hub.add_repo("org/model", {path.name: path.read_bytes() for path in folder.iterdir()})
        environment = hub.environment(tmp_path / "home")
        refused(run_cli("convert", "org/model", *options, env=environment, cwd=tmp_path), 1, pattern, tmp_path / "out")
        told = json.loads(run_cli("inspect", "org/model", "--json", env=environment, cwd=tmp_path).stdout)
    assert REFUSED[case][2] in told["sharing"]["reason"]


@pytest.mark.parametrize(
    ("tensors", "quantisation"),
    [
        (replaced(MLP, NF4), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        (replaced(MLP, INT8), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        (replaced(MLP, GPTQ), {"quant_method": "gptq", "bits": 4}),
        (PLAIN, {"quant_method": "exl2", "bits": 4}),  # transformers passes over a method that it does not know
        (PLAIN, {"quant_method": "fp8"}),
        (PLAIN, {"quant_method": "mxfp4"}),
        (PLAIN, {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}),
        (PLAIN, None),
    ],
)
def test_what_transformers_runs_is_not_refused(tmp_path, tensors, quantisation):
    config = {**CONFIG, **({"quantization_config": quantisation} if quantisation else {})}
    folder = write_model(tmp_path / "m", config, tensors or llama_tensors(CONFIG))
    assert model_of(open_model(str(folder))).geometry.total_groups == 8


@pytest.mark.parametrize("method", ["exl2", "fp8", "mxfp4"])
def test_transformers_runs_plain_weights_under_these_methods(tmp_path, method):
    from transformers import AutoModelForCausalLM

    expected = save_tiny("llama", tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", quantization_config={"quant_method": method})
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9]])
    assert torch.allclose(found(ids).logits, expected(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "named", "meant"),
    [
        ("llama", "FSDPLlamaForCausalLM", "LlamaForCausalLM"),
        ("llama", "FSDPLlamaForSequenceClassification", "LlamaForSequenceClassification"),
        ("llama", "OptimizedModule", "LlamaForCausalLM"),
        ("llama", "LLaMAForCausalLM", "LlamaForCausalLM"),
        ("llama", "MistralForCausalLM", "LlamaForCausalLM"),
        ("bert", "DistributedDataParallel", "BertForMaskedLM"),
        ("bert", "FSDPBertModel", "BertModel"),
        ("t5", "FullyShardedDataParallel", "T5ForConditionalGeneration"),
        ("gpt2", "FSDPGPT2LMHeadModel", "GPT2LMHeadModel"),
    ],
)
def test_names_of_wrappers_under_architectures(tmp_path, model_type, named, meant):
    """transformers goes by the auto class that it is asked for."""
    from sa_convert.domain.plan import Plan
    from sa_convert.models.auto_class import architecture_of

    folder = write_model(tmp_path / "m", {"model_type": model_type, "architectures": [named]}, llama_tensors(CONFIG))
    checkpoint = open_model(str(folder))
    written = converted_config(checkpoint, family_of(checkpoint.config), Plan())
    assert written["architectures"] == [f"SharedAttention{meant}"]
    assert architecture_of(checkpoint.config) == meant


def test_names_that_begin_with_the_base_model_once_more(tmp_path):
    """transformers loads them, so they are converted, and the result is loaded alike."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from support.tiny_models import load_converted

    base = save_tiny("llama", tmp_path / "m", max_shard_size="1GB")
    file = tmp_path / "m" / "model.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    told = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)[1]
    assert not told["missing_keys"]
    result = run_cli("convert", tmp_path / "m", "--recipe", "late-span", "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == 0, result.stderr
    found = load_converted(tmp_path / "out").state_dict()
    assert all(tensor.equal(base.state_dict()[name]) for name, tensor in found.items())


KINDS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "run 'git lfs pull'",
    b"<!DOCTYPE html><html></html>": "is a web page",
    b"GGUF\x03\x00\x00\x00" + bytes(40): "is a GGUF file",
}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
@pytest.mark.parametrize("data", KINDS, ids=lambda data: data[:7].decode())
def test_files_that_are_something_else(tmp_path, data, name):
    folder = write_model(tmp_path / "m", CONFIG, llama_tensors(CONFIG))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_model(str(folder))
    assert KINDS[data] in str(caught.value)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("gptj", "num_key_value_heads", 2),
        ("gptj", "head_dim", 4),
        ("opt", "num_key_value_heads", 4),
        ("bert", "head_dim", 32),
        ("gpt2", "head_dim", 5),
    ],
)
def test_keys_of_config_json_that_the_family_does_not_read(tmp_path, model_type, key, value):
    save_tiny(model_type, tmp_path / "m")
    plain = model_of(open_model(str(tmp_path / "m"))).geometry
    edit_json(tmp_path / "m" / "config.json", **{key: value})
    assert model_of(open_model(str(tmp_path / "m"))).geometry == plain


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [("llama", "num_key_value_heads", 2), ("llama", "head_dim", 32), ("qwen2", "num_key_value_heads", 8)],
)
def test_keys_that_the_family_reads_must_fit(tmp_path, model_type, key, value):
    save_tiny(model_type, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=key):
        model_of(open_model(str(tmp_path / "m")))
