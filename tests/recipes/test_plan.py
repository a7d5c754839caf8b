"""Plans: as recipes and config.json have them, and what a model cannot run."""

import pickle

import pytest

from sa_convert.domain.plan import Plan
from sa_convert.errors import PlanError, RecipeError
from sa_convert.families.table import FAMILIES
from sa_convert.plan.conversion import plan_conversion, resolved_recipe
from sa_convert.plan.converted import upgraded
from sa_convert.plan.recipe_file import dump_recipe, parse_recipe
from sa_convert.plan.savings import bytes_per_token, cache_at
from sa_convert.read.folder import open_folder
from sa_convert.read.model_of import model_of
from sa_convert.rewrite.config import version_2
from sa_convert.treatments.share.plans import map_of
from support.tiny_models import save_tiny

LAYERS = {
    "2": {"0": {"share": [[1, 0], [0, 3]]}, "3": {"share": [None, [1, 7]]}},
    "4": {"1": {"share": [[3, 2], [3, 3]]}},
}
RECIPE = """
plan:
  2: {0: {share: [[1, 0], [0, 3]]}, 3: {share: [null, [1, 7]]}}
  4: {1: {share: [[3, 2], [3, 3]]}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    found = {}
    for name in ("llama", "bart"):
        save_tiny(name, home / name)
        found[name] = model_of(open_folder(home / name))
    return found


def test_json_names_groups_by_texts_and_comes_back():
    plan = Plan.from_json({**LAYERS, "5": "drop"})
    assert plan.to_json() == {**LAYERS, "5": "drop"}
    assert Plan.from_json(plan.to_json()) == plan == pickle.loads(pickle.dumps(plan))
    assert plan.treatments == ("drop", "share")
    assert (plan.group_count("share"), plan.layers_of("drop"), plan.group_count("drop")) == (3, (5,), 0)
    assert plan.groups_of("share")[4] == {1: ((3, 2), (3, 3))}
    assert plan.only("share") == Plan.from_json(LAYERS)
    assert not plan.only("window")


def test_layers_of_stacks_are_numbered_through():
    stacks = (("encoder", 3), ("decoder", 2))
    plan = Plan.from_json({"decoder.1": {"0": {"share": [[0, 0]]}}}, stacks)
    assert list(plan.layers) == [4]
    assert plan.to_json() == {"decoder.1": {"0": {"share": [[0, 0]]}}}
    with pytest.raises(ValueError, match=r"no stack 'decoder\.cross'"):
        Plan.from_json({"decoder.cross.1": {}}, stacks)


@pytest.mark.parametrize("layers", [{"2": [[0, 1]]}, {"2": {"0": ["share"]}}, {"2": {"a": {}}}, {"x": {}}])
def test_what_is_no_plan_is_refused(layers):
    with pytest.raises(ValueError, match=r"."):
        Plan.from_json(layers)


def test_a_plan_cannot_be_changed():
    plan = Plan.from_json(LAYERS)
    with pytest.raises(TypeError):
        plan.layers[2][0]["share"] = ()
    with pytest.raises(TypeError):
        plan.layers[2][0]["share"][0] = None


def test_an_explicit_plan_is_the_same_as_the_map(models):
    by_plan = plan_conversion(models["llama"], parse_recipe(RECIPE, "r.yaml"))
    rows = "sharing: {map: {2: [[1, 0], [0, 3], null, null, null, null, null, [1, 7]], "
    by_map = plan_conversion(models["llama"], parse_recipe(rows + "4: [~, ~, [3, 2], [3, 3], ~, ~, ~, ~]}}", "r.yaml"))
    assert by_plan.plan == by_map.plan == Plan.from_json(LAYERS)
    assert by_plan.edits == by_map.edits
    assert by_plan.savings == by_map.savings


def test_what_sharing_alone_does_is_written_as_a_map(models):
    recipe = parse_recipe(RECIPE, "r.yaml")
    written = dump_recipe(resolved_recipe(recipe, Plan.from_json(LAYERS), models["llama"].geometry))
    assert "    2: [[1, 0], [0, 3], null, null, null, null, null, [1, 7]]\n" in written
    assert plan_conversion(models["llama"], parse_recipe(written, "again.yaml")).plan == Plan.from_json(LAYERS)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", LAYERS),
        ("bart", {"decoder.cross.1": {"2": {"share": [[0, 5]]}}, "encoder.3": {"0": {"share": [[1, 0]]}}}),
    ],
)
def test_version_1_and_version_2_of_a_plan_say_the_same(models, name, layers):
    model = models[name]
    plan, family = Plan.from_json(layers, model.geometry.stacks), FAMILIES[name]
    config = dict(model.checkpoint.config) | {"shared_attention": {"layers": map_of(plan, model.geometry).to_json()}}
    assert upgraded(config, family, model.geometry)["shared_attention"] == version_2(family, plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("9: {0: {share: [[1, 0], [1, 1]]}}", "line 1: there is no layer '9'; the model has layers 0 to 5"),
        ("decoder.2: {0: {share: [[1, 0]]}}", "line 1: there is no layer 'decoder.2'; this model has plain numbers"),
        ("2: {4: {share: [[1, 0], [1, 1]]}}", "Layer 2 has KV groups 0 to 3, but the plan names 4"),
        ("2: {0: {share: [[1, 0]]}}", "Layer 2 KV group 0 lists 1 heads, but the model has 2 query heads"),
        ("2: {0: {share: [[2, 0], [1, 1]]}}", "a source must be in an earlier layer"),
        ("2: {0: {share: 3}}", "line 1: layer 2 KV group 0: share lists null or"),
        ("2: {0: {share: [[1, 0], [1]]}}", "line 1: layer 2 KV group 0: .1. is neither null nor"),
        ("2: share", "Layer 2: share is not done to whole layers; name its KV groups"),
        ("2: {0: share}", "line 1: layer 2 KV group 0 should be {treatment: arguments}, not 'share'"),
        ("2: {a: {share: [[1, 0]]}}", "line 1: 'a' is not a KV group of layer 2"),
        ("{}", "line 1: plan should list KV groups for each layer"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_its_place(models, plan, message):
    text = f"plan: {{{plan}}}" if plan != "{}" else "plan: {}"
    with pytest.raises((RecipeError, PlanError), match=message):
        plan_conversion(models["llama"], parse_recipe(text, "r.yaml"))


def test_plan_and_sharing_do_not_go_together():
    with pytest.raises(
        RecipeError, match="a recipe needs exactly one of search, sharing, plan, but has sharing and plan"
    ):
        parse_recipe(RECIPE + "sharing: {spans: [{layers: 3}]}", "r.yaml")


def test_the_cache_grows_with_the_context_by_what_a_plan_leaves(models):
    model, plan = models["llama"], Plan.from_json(LAYERS)
    token = 6 * 4 * 2 * 16 * 4  # layers, KV groups, keys and values, head size, bytes
    assert bytes_per_token(model, Plan()) == token
    assert cache_at(model, plan, 1000) == 1000 * bytes_per_token(model, plan) == 1000 * (token - 2 * 16 * 4)
