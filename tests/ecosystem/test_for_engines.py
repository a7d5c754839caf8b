"""What is converted for an engine: an ordinary model of transformers without code, which attends as the plan says."""

import json
import shutil

import pytest
import torch
import yaml

from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Calibration
from sa_convert.errors import SaConvertError
from sa_convert.families.table import FAMILIES
from sa_convert.jobs.converting import ConvertOptions, convert
from sa_convert.observe import in_blocks
from sa_convert.observe.session import open_session
from sa_convert.plan.engines import searched_model
from sa_convert.plan.recipe_file import dump_recipe, load_recipe, parse_recipe
from sa_convert.plan.savings import cache_at
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.budget import check_search, treatments_of
from sa_convert.search.whole_cache import search_cache
from sa_convert.treatments.window import cost as window_cost
from support.forced_windows import forced_windows
from support.loopback_hub import WRITE_TOKEN, LoopbackHub
from support.planted import save_reader
from support.processes import run_cli, run_without_sa_convert
from support.tiny_models import attentions_of, geometry_of_folder, save_tiny, save_tokenizer

SIZE = 8
FULL, SLIDING = "full_attention", "sliding_attention"
CHANGES = {
    "llama": {"attention_bias": False},
    "mistral": {"sliding_window": 512},  # and then none
    "ministral": {"layer_types": [FULL] * 6, "sliding_window": SIZE},
    "qwen2": {"layer_types": [FULL] * 6},
    "qwen3": {},
    "gemma2": {"layer_types": [FULL, SLIDING] * 3, "sliding_window": SIZE},
    "smollm3": {"layer_types": [FULL] * 6},
}
"""What a tiny model of each family needs to have layers that see everything."""


def recipe_for(folder, layers, *, size=SIZE, sinks=0):
    """A recipe with windows of all KV groups of these layers."""
    geometry = geometry_of_folder(folder)
    plan = {
        layer: {group: {"window": {"sinks": sinks, "tokens": size}} for group in range(geometry.layers[layer].groups)}
        for layer in layers
    }
    gate = {"max_perplexity_increase": "90%", "at": 64}
    return parse_recipe(yaml.safe_dump({"for": "vllm", "plan": plan, "gate": gate}, sort_keys=False), "r.yaml")


def made(root, family, layers=(2, 4), **changes):
    """base, its folder, and that of its conversion."""
    base = save_tiny(family, root / "base", **{**CHANGES[family], **changes})
    save_tokenizer(root / "base")
    if family == "mistral":  # as its later releases; transformers would not save that
        config = json.loads((root / "base" / "config.json").read_text())
        (root / "base" / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    options = ConvertOptions(validate=False, device="cpu")
    convert(str(root / "base"), recipe_for(root / "base", layers), root / "out", options)
    return base, root / "base", root / "out"


@pytest.mark.parametrize("family", CHANGES)
def test_the_folder_is_an_ordinary_model_that_attends_by_the_plan(tmp_path, family):
    from transformers import AutoModelForCausalLM

    base, _, out = made(tmp_path, family)
    assert not list(out.rglob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert not {"auto_map", "shared_attention"} & set(config)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, attn_implementation="eager")
    assert type(model).__module__.startswith("transformers.models.")
    assert not any(info.values())
    entry, ids = FAMILIES[family], torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    base.set_attn_implementation("eager")
    heads = base.config.num_attention_heads
    windows = {layer: dict.fromkeys(range(heads), (0, SIZE)) for layer in (2, 4)}
    with torch.no_grad():
        plain = base(ids).logits
        with forced_windows(base, attentions_of(base, entry), windows):
            wanted = base(ids).logits
        found = model.eval()(ids).logits
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    kinds = [SLIDING if layer in windows else kind for layer, kind in enumerate(_kinds(base.config))]
    assert config["layer_types"] == kinds
    assert config["sliding_window"] == SIZE


def _kinds(config):
    return getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers


def test_what_a_llama_leaves_out_is_what_llama_takes(tmp_path):
    """Ministral's defaults are others."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MinistralConfig

    base, folder, _ = made(tmp_path, "llama", num_key_value_heads=8)
    mine, other = LlamaConfig().to_dict(), MinistralConfig().to_dict()
    differ = {key for key in mine if key in other and mine[key] != other[key]}
    told = FAMILIES["llama"].stock_windows
    written = {"model_type", "layer_types", "sliding_window", "num_key_value_heads", "head_dim"}
    assert differ <= set(told.fills) | written
    assert all(mine[key] == value for key, value in told.fills.items())
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps"):
        left = {name: value for name, value in config.items() if name != key}
        if mine.get(key) != config[key] and key not in ("num_key_value_heads", "head_dim"):
            continue
        (folder / "config.json").write_text(json.dumps(left))
        convert(str(folder), recipe_for(folder, (1,)), tmp_path / key, ConvertOptions(validate=False, device="cpu"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / key)
        assert model.config.num_key_value_heads == 8
        assert model.config.head_dim == base.config.head_dim


REFUSALS = {
    "gpt2": ("gpt2", {}, {}, "models of type 'gpt2' cannot be written without code: no class that transformers and"),
    "gemma 3": ("gemma3_text", {}, {}, "the type of a layer also says how far its keys are turned by position"),
    "biases": (
        "llama",
        {"attention_bias": True},
        {},
        "only if 'attention_bias' in config.json is False, and it is True",
    ),
    "all windowed": ("mistral", {"sliding_window": 8}, {}, "every layer of this one has a window of 8 tokens already"),
    "sinks": ("llama", {"attention_bias": False}, {"sinks": 4}, "Layer 2: vLLM keeps no first tokens beside a window"),
    "another size": (
        "gemma2",
        {"layer_types": [FULL, SLIDING] * 3, "sliding_window": 16},
        {},
        "layers of this model have 16 tokens already, so no layer can have 8",
    ),
    "a layer with a window": (
        "gemma2",
        {"layer_types": [SLIDING, FULL] * 3, "sliding_window": 8},
        {},
        "Layer 2 has sliding.8. attention already",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path, case):
    family, changes, keys, message = REFUSALS[case]
    save_tiny(family, tmp_path / "base", **changes)
    recipe = recipe_for(tmp_path / "base", (2, 4), **keys)
    with pytest.raises(SaConvertError, match=message):
        convert(str(tmp_path / "base"), recipe, tmp_path / "out", ConvertOptions(validate=False, device="cpu"))
    assert not (tmp_path / "out").exists()


PLANS = {
    "one KV group": ({2: {0: {"window": {"sinks": 0, "tokens": 8}}}}, "Layer 2: vLLM has one window for all KV groups"),
    "two sizes": (
        {
            layer: {group: {"window": {"sinks": 0, "tokens": size}} for group in range(4)}
            for layer, size in ((2, 8), (3, 9))
        },
        "config.json has one length for all windows, so they cannot be 8 and 9",
    ),
    "something else": ({2: "linear"}, "Layer 2: vLLM knows windows of whole layers, or layers without attention"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_a_stock_class_cannot_be_told_are_refused(tmp_path, case):
    plan, message = PLANS[case]
    save_tiny("llama", tmp_path / "base", attention_bias=False)
    recipe = parse_recipe(yaml.safe_dump({"for": "vllm", "plan": plan}), "r.yaml")
    with pytest.raises(SaConvertError, match=message):
        convert(str(tmp_path / "base"), recipe, tmp_path / "out", ConvertOptions(validate=False, device="cpu"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "for: tgi\nsharing: {spans: [{layers: 3}]}",
            "r.yaml, line 1: for should be 'transformers' or 'vllm', not 'tgi'",
        ),
        ("for: vllm\nsharing: {spans: [{layers: 3}]}", "r.yaml, line 2: vLLM has nothing of its own that shares"),
        (
            "search: {cache: 30%, at: 64}\nfor: vllm\ntreatments: [window, share]",
            "line 3: vLLM has nothing of its own that saves memory by 'share'; for: vllm takes window, merge or drop",
        ),
    ],
)
def test_recipes_that_ask_for_more_are_refused_with_the_line(tmp_path, text, message):
    save_tiny("llama", tmp_path, attention_bias=False)
    with pytest.raises(SaConvertError, match=message):
        convert(str(tmp_path), parse_recipe(text, "r.yaml"), tmp_path / "out", ConvertOptions(device="cpu"))


def test_the_key_comes_back_and_the_usual_engine_is_not_written(tmp_path):
    text = "for: vllm\nsearch: {cache: 30%, at: 64}\n"
    recipe = parse_recipe(text, "r.yaml")
    assert recipe.engine == "vllm"
    assert parse_recipe(dump_recipe(recipe), "s.yaml") == recipe
    assert "for:" not in dump_recipe(recipe.with_engine("transformers"))


def test_own_windows_as_long_as_the_text_are_nothing_to_search_for(tmp_path):
    save_tiny("gemma2", tmp_path, layer_types=[FULL, SLIDING] * 3, sliding_window=64)
    recipe = parse_recipe("for: vllm\nsearch: {cache: 30%, at: 64}", "r.yaml")
    with pytest.raises(SaConvertError, match=r"line 2: windows .* layers of this model have 64 tokens already"):
        check_search(model_of(open_model(str(tmp_path))), recipe)


def test_a_search_windows_whole_layers_alike_and_leaves_the_one_that_reads_far_back(tmp_path, monkeypatch):
    monkeypatch.setattr(in_blocks, "BLOCK", 64)
    monkeypatch.setattr(window_cost, "WINDOWS", (16, 32, 64))
    model = model_of(open_model(str(save_reader(tmp_path, 3, 2))))
    recipe = parse_recipe("for: vllm\nsearch: {cache: 50%, at: 256}", "r.yaml")
    seen, used = searched_model(model, recipe), treatments_of(recipe, model)
    with open_session(seen, Calibration(sequences=4, length=32), treatments=used, at=256) as session:
        step = search_cache(session, recipe)
    assert 3 not in step.plan.layers
    groups = {layer: len(groups) for layer, groups in step.plan.groups_of("window").items()}
    assert set(groups.values()) == {model.geometry.layers[0].groups}
    told = {json.dumps(dict(one)) for groups in step.plan.groups_of("window").values() for one in groups.values()}
    assert len(told) == 1
    assert json.loads(next(iter(told)))["sinks"] == 0
    assert 1 - cache_at(model, step.plan, 256) / cache_at(model, Plan(), 256) >= 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A validated conversion for vLLM by the command line, with its base beside it."""
    root = tmp_path_factory.mktemp("engine")
    save_tiny("llama", root / "base", attention_bias=False)
    save_tokenizer(root / "base")
    recipe = dump_recipe(recipe_for(root / "base", (2, 4)).with_engine("transformers"))
    (root / "r.yaml").write_text(recipe)
    done = run_cli("convert", root / "base", "--recipe", root / "r.yaml", "--for", "vllm", "-o", root / "out", "--json")
    assert done.returncode == 0, done.stderr
    return root / "out"


def test_report_recipe_and_card_say_what_it_is_for(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["for"]["engine"] == "vllm"
    assert report["for"]["architecture"] == "MinistralForCausalLM"
    assert report["treatments"] == {"window": {"groups": 8}}
    assert report["decode_check"]["same_greedy_tokens"] is True
    # A sliding layer of transformers keeps one token less than its window.
    at = report["cache_bytes"]
    assert at["after"] == at["before"] * (4 * 64 + 2 * (SIZE - 1)) // (6 * 64)
    assert load_recipe(str(folder / "recipe.yaml")).engine == "vllm"
    card = (folder / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "vllm serve" in card
    assert "custom_code" not in card


def test_run_again_its_recipe_gives_the_same_folder(folder, tmp_path):
    done = run_cli("convert", folder.parent / "base", "--recipe", folder / "recipe.yaml", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for file in [path for path in folder.rglob("*") if path.is_file() and path.name != "report.json"]:
        assert (tmp_path / "out" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file


def test_it_loads_where_sa_convert_is_not_installed(folder):
    program = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"ids = AutoTokenizer.from_pretrained({str(folder)!r})('The quick brown fox', return_tensors='pt')\n"
        "report(kind=type(model).__name__, tokens=model.generate(**ids, max_new_tokens=4)[0].tolist())\n"
    )
    found = run_without_sa_convert(program, folder.parent)
    assert found["kind"] == "MinistralForCausalLM"
    assert found["tokens"]


def test_inspect_audit_evaluate_and_bench_take_it(folder):
    inspected = run_cli("inspect", folder, "--json")
    assert json.loads(inspected.stdout)["model_type"] == "ministral"
    audited = run_cli("audit", folder)
    assert audited.returncode == 0, audited.stderr
    assert "no code: written for vllm" in audited.stdout
    told = run_cli("evaluate", folder, "--against", folder.parent / "base", "--length", 64, "--json")
    assert told.returncode == 0, told.stderr
    timed = run_cli(
        "bench", folder, "--against", folder.parent / "base", "--contexts", 40, "--new-tokens", 4, "--repeats", 1
    )
    assert timed.returncode == 0, timed.stderr


def test_code_that_somebody_put_there_is_told(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "modeling_other.py").write_text("")
    audited = run_cli("audit", copy)
    assert audited.returncode == 1
    assert "modeling_other.py" in audited.stderr


def test_it_is_replaced_only_if_it_is_asked_for(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    command = ("convert", folder.parent / "base", "--recipe", folder / "recipe.yaml", "-o", copy, "--no-validate")
    assert run_cli(*command).returncode == 1
    assert run_cli(*command, "--overwrite").returncode == 0


def test_it_is_pushed_twice_and_never_over_another_model(folder, tmp_path):
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "cache", WRITE_TOKEN)
        for _ in range(2):
            done = run_cli("push", folder, "tester/model", env=environment)
            assert done.returncode == 0, done.stderr
        assert hub.unanswered == []


def test_a_plan_that_config_does_not_have_is_not_pushed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["layer_types"] = [FULL] * 6
    (copy / "config.json").write_text(json.dumps(config))
    with LoopbackHub() as hub:
        done = run_cli("push", copy, "tester/model", env=hub.environment(tmp_path / "cache", WRITE_TOKEN))
    assert done.returncode == 1
    assert "gives layer 2 no window" in done.stderr


def test_it_is_healed_into_another_one(folder, tmp_path):
    options = ("--tokens", "4k", "--length", 64, "--no-validate", "--device", "cpu")
    done = run_cli("heal", folder, "-o", tmp_path / "healed", "--against", folder.parent / "base", *options)
    assert done.returncode in (0, 3), done.stderr
    if done.returncode == 0:
        healed = json.loads((tmp_path / "healed" / "report.json").read_text())
        assert healed["for"]["engine"] == "vllm"
        assert not list((tmp_path / "healed").rglob("*.py"))
    else:
        assert "Healing was refused" in done.stderr
