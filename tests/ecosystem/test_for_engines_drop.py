"""What is converted for an engine with layers that have no attention, or fewer KV groups: the engine's class is named,
and told of each layer by config.json; transformers runs the code in the folder. `test_vllm_blocks.py` has the engine.
"""

import json

import pytest
import torch
import yaml

from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Calibration
from sa_convert.errors import SaConvertError
from sa_convert.families.table import FAMILIES
from sa_convert.jobs.converting import ConvertOptions, convert
from sa_convert.observe.session import open_session
from sa_convert.plan.conversion import conversion_of
from sa_convert.plan.engines import searched_model
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.plan.savings import cache_at
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.budget import treatments_of
from sa_convert.search.fitting import learn
from sa_convert.search.whole_cache import search_cache
from support.loopback_hub import WRITE_TOKEN, LoopbackHub
from support.processes import run_cli, run_without_sa_convert
from support.tiny_models import attentions_of, save_tiny, save_tokenizer

DROPPED = (2, 4)


def recipe_of(plan):
    gate = {"max_perplexity_increase": "90%", "at": 64}
    return parse_recipe(yaml.safe_dump({"for": "vllm", "plan": plan, "gate": gate}, sort_keys=False), "r.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base, and out: a validated conversion by the command line."""
    root = tmp_path_factory.mktemp("drops")
    save_tiny("llama", root / "base")
    save_tokenizer(root / "base")
    lines = [f"  {layer}: drop" for layer in DROPPED]
    gate = "gate: {max_perplexity_increase: 90%, at: 64}"
    (root / "r.yaml").write_text("\n".join(["plan:", *lines, gate, ""]))
    done = run_cli("convert", root / "base", "--recipe", root / "r.yaml", "--for", "vllm", "-o", root / "out", "--json")
    assert done.returncode == 0, done.stderr
    return root


def test_in_transformers_the_layers_put_out_nothing_and_every_tensor_is_used(root):
    """Against the base, whose attention in these layers is set to zero from outside."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    model, info = AutoModelForCausalLM.from_pretrained(root / "out", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = base(ids).logits
        for layer in DROPPED:
            attention = attentions_of(base, FAMILIES["llama"])[layer]
            attention.register_forward_hook(lambda _, __, output: (torch.zeros_like(output[0]), *output[1:]))
        wanted, found = base(ids).logits, model.eval()(ids).logits
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_the_engine_is_told_of_every_layer(root):
    config = json.loads((root / "out" / "config.json").read_text())
    assert config["architectures"] == ["SharedAttentionLlamaForCausalLM", "DeciLMForCausalLM"]
    blocks = config["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [layer in DROPPED for layer in range(6)]
    kept = {block["attention"]["n_heads_in_group"] for block in blocks if not block["attention"]["no_op"]}
    assert kept == {config["num_attention_heads"] // config["num_key_value_heads"]}
    assert all(block["ffn"] == {"no_op": False, "intermediate_size": config["intermediate_size"]} for block in blocks)
    tensors = open_model(str(root / "out")).tensors
    for layer in range(6):
        start, there = f"model.layers.{layer}.", layer not in DROPPED
        assert (f"{start}input_layernorm.weight" in tensors) == there
        assert any(name.startswith(f"{start}self_attn.") for name in tensors) == there


def test_engines_read_blocks_by_attribute_and_a_saved_copy_has_them(root, tmp_path):
    """Where sa_convert is not installed, as in an engine."""
    program = (
        "import copy, pickle\n"
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(root / 'out')!r}, trust_remote_code=True)\n"
        "block = copy.deepcopy(config).block_configs[2]\n"
        "again = pickle.loads(pickle.dumps(block))\n"
        f"config.save_pretrained({str(tmp_path)!r})\n"
        "report(no_op=again.attention.no_op, has=[hasattr(block.ffn, n) for n in ('ffn_mult', 'intermediate_size')])\n"
    )
    assert run_without_sa_convert(program, tmp_path) == {"no_op": True, "has": [False, True]}
    saved, told = (json.loads((at / "config.json").read_text()) for at in (tmp_path, root / "out"))
    assert saved["block_configs"] == told["block_configs"]


def test_a_missing_size_is_what_the_family_takes(tmp_path):
    from transformers import LlamaConfig, MistralConfig

    for kind in (LlamaConfig, MistralConfig):
        fills = FAMILIES[kind.model_type].stock_blocks.fills
        assert fills == {"intermediate_size": kind().intermediate_size}


def test_what_it_says_of_itself(root):
    report = json.loads((root / "out" / "report.json").read_text())
    assert report["for"] == {"engine": "vllm", "architecture": "DeciLMForCausalLM", "options": "--trust-remote-code"}
    assert report["decode_check"]["same_greedy_tokens"] is True
    assert report["cache_bytes"]["after"] * 6 == report["cache_bytes"]["before"] * 4
    card = (root / "out" / "README.md").read_text()
    assert "vllm serve PATH_OR_REPO_ID --trust-remote-code" in card
    assert "custom_code" in card
    dry = run_cli("convert", root / "base", "--recipe", root / "out" / "recipe.yaml", "--dry-run", "-o", root / "no")
    assert "vllm, with code for transformers: DeciLMForCausalLM" in dry.stdout


def test_run_again_its_recipe_gives_the_same_folder_of_blocks(root, tmp_path):
    done = run_cli("convert", root / "base", "--recipe", root / "out" / "recipe.yaml", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for file in [path for path in (root / "out").rglob("*") if path.is_file() and path.name != "report.json"]:
        assert (tmp_path / "out" / file.relative_to(root / "out")).read_bytes() == file.read_bytes(), file


def test_the_other_commands_take_such_a_folder(root, tmp_path):
    assert json.loads(run_cli("inspect", root / "out", "--json").stdout)["model_type"] == "shared_attention_llama"
    audited = run_cli("audit", root / "out")
    assert audited.returncode == 0, audited.stderr + audited.stdout
    told = run_cli("evaluate", root / "out", "--against", root / "base", "--length", 64, "--json")
    assert told.returncode == 0, told.stderr
    with LoopbackHub() as hub:
        done = run_cli("push", root / "out", "tester/model", env=hub.environment(tmp_path / "cache", WRITE_TOKEN))
    assert done.returncode == 0, done.stderr


def test_such_a_folder_is_healed_into_another_one(root, tmp_path):
    options = ("--train", "layers", "--tokens", "4k", "--length", 64, "--no-validate", "--device", "cpu")
    done = run_cli("heal", root / "out", "-o", tmp_path / "healed", "--against", root / "base", *options)
    assert done.returncode in (0, 3), done.stderr
    if done.returncode == 0:
        told = [json.loads((at / "config.json").read_text()) for at in (tmp_path / "healed", root / "out")]
        assert told[0] == told[1]
    else:
        assert "Healing was refused" in done.stderr


REFUSALS = {
    "first layer": ("llama", {}, {0: "drop"}, "Layer 0: DeciLMForCausalLM of vLLM needs attention in the first layer"),
    "qwen2": ("qwen2", {}, {2: "drop"}, "no class of vLLM is told of any. Types that can: llama, mistral"),
    "windows of its own": ("mistral", {"sliding_window": 8}, {2: "drop"}, "here some have one of 8 tokens"),
    "windows besides": (
        "llama",
        {},
        {2: "drop", 3: {group: {"window": {"sinks": 0, "tokens": 8}} for group in range(4)}},
        "Layer 3: vLLM has a class for windows of layers, and one for layers without attention or with fewer KV groups",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_class_of_the_engine_can_be_told_is_refused(tmp_path, case):
    family, changes, plan, message = REFUSALS[case]
    save_tiny(family, tmp_path / "base", **changes)
    with pytest.raises(SaConvertError, match=message):
        convert(str(tmp_path / "base"), recipe_of(plan), tmp_path / "out", ConvertOptions(validate=False, device="cpu"))
    assert not (tmp_path / "out").exists()


def test_both_at_once_are_refused_with_the_line(root):
    text = "for: vllm\nsearch: {cache: 30%, at: 64}\ntreatments: [window, drop]\n"
    message = "line 3: vLLM has no class with windows in some layers and no attention, or fewer KV groups, in others"
    with pytest.raises(SaConvertError, match=message):
        convert(str(root / "base"), parse_recipe(text, "r.yaml"), root / "no", ConvertOptions(device="cpu"))


def test_merged_and_dropped_layers_are_told_together(root, tmp_path):
    """The first layer may be merged, if it cannot be dropped."""
    recipe = recipe_of({0: "merge", 2: "drop", 3: {"merge": {"groups": 2}}})
    report = convert(str(root / "base"), recipe, tmp_path / "out", ConvertOptions(device="cpu"))
    assert report.decode_check.same_greedy_tokens
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["SharedAttentionLlamaForCausalLM", "DeciLMForCausalLM"]
    told = [block["attention"] for block in config["block_configs"]]
    assert told == [{"no_op": at == 2, "n_heads_in_group": size} for at, size in enumerate((8, 2, None, 4, 2, 2))]
    tensors = open_model(str(tmp_path / "out")).tensors
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape[0] == config["head_dim"]
    assert "model.layers.0.input_layernorm.weight" in tensors


def test_a_search_for_the_engine_merges_and_drops(root):
    text = "for: vllm\ntreatments: [merge, drop]\nsearch: {cache: 60%, at: 64}"
    model, recipe = model_of(open_model(str(root / "base"))), parse_recipe(text, "r.yaml")
    used = treatments_of(recipe, model)
    assert [treatment.name for treatment in used] == ["merge", "drop"]
    calibration = Calibration(sequences=4, length=32)
    with open_session(searched_model(model, recipe), calibration, treatments=used, at=64) as session:
        learn(session, None)
        plan = search_cache(session, recipe).plan
    assert set(plan.treatments) <= {"merge", "drop"}
    assert plan.layers.get(0) != "drop"
    assert conversion_of(model, plan, recipe).stock.architecture == "DeciLMForCausalLM"
    assert 1 - cache_at(model, plan, 64) / cache_at(model, Plan(), 64) >= 0.6


def test_a_search_drops_layers_and_never_the_first(root):
    model = model_of(open_model(str(root / "base")))
    recipe = parse_recipe("for: vllm\ntreatments: [drop]\nsearch: {cache: 50%, at: 64}", "r.yaml")
    seen, used = searched_model(model, recipe), treatments_of(recipe, model)
    with open_session(seen, Calibration(sequences=4, length=32), treatments=used, at=64) as session:
        plan = search_cache(session, recipe).plan
    assert set(plan.layers.values()) == {"drop"}
    assert 0 not in plan.layers
    assert 1 - cache_at(model, plan, 64) / cache_at(model, Plan(), 64) >= 0.5
