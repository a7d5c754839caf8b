"""A treatment that only its own four files and its registration know goes all the way, from recipe to benchmark."""

import json
from importlib import import_module

import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file

from sa_convert.domain.plan import Plan
from sa_convert.errors import PlanError, RecipeError
from sa_convert.jobs.converting import ConvertOptions, convert, plan
from sa_convert.jobs.inspecting import inspect
from sa_convert.measure.speed.expected_work import attention_layers
from sa_convert.plan.recipe_file import dump_recipe, load_recipe, parse_recipe
from sa_convert.present.terminal.inspection_text import render_inspection
from sa_convert.present.terminal.plan_text import plan_json, render_plan
from sa_convert.present.terminal.report_text import render_report
from sa_convert.read.open_model import open_model
from sa_convert.treatments.registry import also, named
from support import toy_treatment
from support.tiny_models import save_tiny, save_tokenizer

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "attention_bias": False}
EXPLICIT = (
    "plan:\n  2: {1: {zero: true}, 3: {zero: true}}\n  4: {2: {zero: true}}\ngate: {max_perplexity_increase: 90%}"
)
SEARCH = """
sharing: {search: {key_cache: 8%}}
treatments: [zero]
calibration: {sequences: 6, length: 32}
gate: {max_perplexity_increase: 90%}
"""


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    home = tmp_path_factory.mktemp("packages")
    toy_treatment.write_package(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        treatment = import_module(f"{toy_treatment.PACKAGE}.treatment").ZeroTreatment()
        with also(treatment):
            yield treatment
    assert named("zero") is None


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of which the groups 3.1 and 5.2 have no output anyway."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny("llama", folder, max_shard_size="10GB", **SIZES)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer, group in ((3, 1), (5, 2)):
        zeroed(tensors, layer, group)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def zeroed(tensors, layer, group):
    """The values of a KV group are made zero in a checkpoint."""
    tensors[f"model.layers.{layer}.self_attn.v_proj.weight"][16 * group : 16 * (group + 1)] = 0


@pytest.fixture(scope="module")
def converted(zero, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    recipe = parse_recipe(EXPLICIT, "toy.yaml")
    report = convert(str(base), recipe, folder, ConvertOptions(device="cpu"), "toy.yaml")
    return folder, report


def test_a_recipe_may_name_it_and_is_refused_with_its_line(zero):
    recipe = parse_recipe(EXPLICIT, "r.yaml")
    assert recipe.plan == {2: {1: {"zero": True}, 3: {"zero": True}}, 4: {2: {"zero": True}}}
    assert parse_recipe(dump_recipe(recipe), "again.yaml") == recipe
    for text, message in (
        (
            "plan:\n  2:\n    1: {zero: 3}",
            r"line 3: layer 2 KV group 1: zero takes no arguments but true, not 3",
        ),
        ("plan:\n  2: {1: {zro: true}}", r"r.yaml, line 2: there is no treatment 'zro'; did you mean 'zero'\?"),
        ("sharing: {search: {key_cache: 5%}}\ntreatments: [zro]", r"r.yaml, line 2: there is no treatment 'zro'"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(text, "r.yaml")


def test_a_plan_that_it_forbids_is_refused(zero, base):
    recipe = parse_recipe("plan: {2: {0: {zero: true}, 1: {zero: true}, 2: {zero: true}, 3: {zero: true}}}", "r.yaml")
    with pytest.raises(PlanError, match="Layer 2 would have no KV group left"):
        plan(str(base), recipe, ConvertOptions())


def test_a_search_finds_the_groups_that_do_nothing(zero, base):
    found = plan(str(base), parse_recipe(SEARCH, "search.yaml"), ConvertOptions(device="cpu"))
    assert found.plan == Plan({3: {1: {"zero": True}}, 5: {2: {"zero": True}}})
    assert found.savings.key_cache_removed == pytest.approx(2 / 24)


def test_a_dry_run_shows_it(zero, base):
    found = plan(str(base), parse_recipe(EXPLICIT, "r.yaml"), ConvertOptions())
    assert "zero             3 of 24 KV groups" in render_plan(found)
    told = plan_json(found)
    assert told["savings"]["cache_bytes_per_token"] == {"before": 24 * 2 * 64, "after": 24 * 2 * 64 - 3 * 64}
    sliced = [f"model.layers.{layer}.self_attn.{side}_proj.weight" for layer in (2, 4) for side in "kq"]
    assert told["tensors"] == {"dropped": [], "sliced": sliced}


def test_weights_configuration_and_code_are_written(converted, base, zero):
    folder, _ = converted
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    for layer, kept in ((2, (0, 2)), (4, (0, 1, 3))):
        for side, rows in (("q", 32), ("k", 16)):
            name = f"model.layers.{layer}.self_attn.{side}_proj.weight"
            parts = [before[name][rows * group : rows * (group + 1)] for group in kept]
            assert torch.equal(after[name], torch.cat(parts))
    config = json.loads((folder / "config.json").read_text())["shared_attention"]
    assert config["layers"] == {"2": {"1": {"zero": True}, "3": {"zero": True}}, "4": {"2": {"zero": True}}}
    assert "plan:\n  2: {1: {zero: true}, 3: {zero: true}}\n" in (folder / "recipe.yaml").read_text()
    assert (folder / "shared_attention_zero.py").read_bytes() == zero.runtime_file.read_bytes()
    assert not (folder / "shared_attention_share.py").exists()


def test_the_written_recipe_gives_the_same_plan(converted, base, zero):
    folder, _ = converted
    assert load_recipe(str(folder / "recipe.yaml")).plan == parse_recipe(EXPLICIT, "r.yaml").plan


def test_report_card_and_figure_tell_of_it(converted):
    folder, report = converted
    told = json.loads((folder / "report.json").read_text())
    assert told["treatments"] == {"zero": {"groups": 3}}
    assert told["sharing"] == {"layers": {}, "reused_groups": 0, "total_groups": 24}
    assert told["savings"]["key_cache_removed"] == pytest.approx(3 / 24)
    assert "3 of 24 KV groups" in render_report(report)
    assert "reuse" not in render_report(report)
    card = (folder / "README.md").read_text()
    assert "converted so that 3 of 24 KV groups are treated by `zero`" in card
    assert "| 2 | 1, 3 |\n| 4 | 2 |" in card
    with Image.open(folder / "figures" / "plan.png") as image:
        colours = {colour: count for count, colour in image.getcolors(1 << 20)}
    assert colours[ImageColor.getrgb("#202020")] > 3 * 30 * 30


def test_inspect_tells_what_was_done(converted, base):
    text = render_inspection(inspect(str(converted[0])))
    assert "Treated by zero  3 of 24 KV groups" in text
    assert inspect(str(converted[0])).cache_bytes_per_token == 24 * 2 * 64 - 3 * 64
    assert "Treated by zero" not in render_inspection(inspect(str(base)))


def test_bench_expects_less_work(converted, base):
    layers = attention_layers(open_model(str(converted[0])), True)
    assert [(layer.heads, layer.own) for layer in layers] == [(8, 8), (8, 8), (4, 4), (8, 8), (6, 6), (8, 8)]


def test_the_converted_model_computes_what_the_base_does_without_these_values(converted, base):
    from transformers import AutoModelForCausalLM

    folder, report = converted
    assert report.decode_check.passed
    reference = AutoModelForCausalLM.from_pretrained(base)
    state = reference.state_dict()
    for layer, group in ((2, 1), (2, 3), (4, 2)):
        zeroed(state, layer, group)
    reference.load_state_dict(state)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, atol=1e-5, rtol=1e-5)
    assert model.generate(tokens, max_new_tokens=6, do_sample=False).tolist() == (
        reference.generate(tokens, max_new_tokens=6, do_sample=False).tolist()
    )


def test_bench_runs_it(converted, base, tmp_path, monkeypatch):
    """Also from a process that has loaded the code of other folders."""
    (tmp_path / "transformers_modules").mkdir()
    (tmp_path / "transformers_modules" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    from sa_convert.jobs.benchmarking import bench
    from sa_convert.measure.speed.request import BenchOptions

    options = BenchOptions(contexts=(16,), batches=(1,), steps=2, repeats=1, warmup=0, device="cpu", trust=True)
    (pairing,) = bench(str(converted[0]), str(base), options).pairings
    assert pairing.model.cache_bytes / pairing.against.cache_bytes == pytest.approx(1 - 3 / 48)
