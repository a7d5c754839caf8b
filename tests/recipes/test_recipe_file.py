"""Recipes from files: what loads, what is refused, and with which line."""

import re
from pathlib import Path

import pytest

from sa_convert.console.amounts import format_percent
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.recipe import Recipe
from sa_convert.errors import RecipeError
from sa_convert.plan.recipe_file import dump_recipe, load_recipe, parse_recipe, shipped_recipes
from sa_convert.treatments.share.plans import recipe_of
from sa_convert.treatments.share.sharing_map import SharingMap
from sa_convert.treatments.share.spans import sharing_of

ROOT = Path(__file__).parents[2]
SPANS = "sharing: {spans: [{layers: 27-30}]}\n"


def test_full_recipe_with_search():
    recipe = parse_recipe(
        """
description: A quarter
sharing:
  search: {key_cache: 25 %}
refit: ridge
calibration: {text: "hub:wikitext:v1:test", sequences: 4, length: 64}
gate: {max_perplexity_increase: 8.5%}
""",
        "r.yaml",
    )
    assert recipe.sharing.search is not None
    assert recipe.sharing.search.key_cache == 0.25
    assert recipe.sharing.spans is None
    assert (recipe.refit, recipe.calibration.sequences, recipe.calibration.length) == ("ridge", 4, 64)
    assert recipe.gate.max_perplexity_increase == 0.085
    assert recipe.needs == {"search", "ridge refit"}


def test_defaults():
    recipe = parse_recipe(SPANS, "r.yaml")
    assert (recipe.refit, recipe.description) == ("none", "")
    assert (recipe.calibration.text, recipe.calibration.sequences, recipe.calibration.length) == ("builtin", 32, 512)
    assert recipe.gate.max_perplexity_increase == 0.05
    assert recipe.sharing.spans[0].source is None
    assert not recipe.needs


def test_map_takes_numbers_and_texts_as_layers():
    recipe = parse_recipe("sharing:\n  map: {27: [[26, 4], null], '3': [null, [0, 1]], decoder.cross.3: [[1, 0]]}", "r")
    assert recipe.sharing.map == {27: ((26, 4), None), 3: (None, (0, 1)), "decoder.cross.3": ((1, 0),)}


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(SPANS, "r").gate.max_perplexity_increase = 0.5


REFUSED = {
    "sharing:\n  spans:\n    - layer: 27-30": "line 3: unknown key 'layer' under sharing.spans[0]; "
    "did you mean 'layers'?",
    SPANS + "calibraton: {}": "line 2: unknown key 'calibraton'; did you mean 'calibration'?",
    SPANS
    + "zzz: 1": "line 2: unknown key 'zzz'; the keys here are description, search, sharing, plan, treatments, refit, "
    "heal, calibration, gate",
    SPANS + "1: 3": "line 2: unknown key '1'; the keys here",
    SPANS + "\nsharing: 3": "line 3: key 'sharing' is written twice",
    "refit: none": "line 1: the key 'search' is missing; or give a 'plan', or 'sharing'",
    "sharing:\n  spans:\n    - {source: 3}": "line 3: the key 'layers' is missing under sharing.spans[0]",
    "sharing: 3": "line 1: sharing should be a mapping of keys and values, not 3",
    "\nsharing: {}": "line 2: sharing needs exactly one of spans, map, search, but has none of them",
    "sharing:\n  spans: [{layers: 2}]\n  map: {2: [[1, 1]]}": "line 1: sharing needs exactly one of spans, map, "
    "search, but has spans and map",
    "sharing:\n  spans: []": "line 2: sharing.spans should be a list with at least one item, not []",
    "sharing:\n  spans: {layers: 1-2}": "line 2: sharing.spans should be a list, not {'layers': '1-2'}",
    "sharing:\n  spans:\n  - 1-2": "line 3: sharing.spans[0] should be a mapping of keys and values, not '1-2'",
    "sharing:\n  spans:\n  - layers: 30-27": "line 3: sharing.spans[0].layers: 30-27 runs backwards",
    "sharing:\n  spans:\n  - layers: 90%-101%": "line 3: sharing.spans[0].layers: 90%-101% goes beyond 100%",
    "sharing:\n  spans:\n  - layers: 27-94%": "line 3: sharing.spans[0].layers: '27-94%' is not a range of layers",
    "sharing:\n  spans:\n  - layers: -3": "line 3: sharing.spans[0].layers: -3 is not a range of layers",
    "sharing:\n  spans:\n  - layers: true": "line 3: sharing.spans[0].layers: True is not a range of layers",
    "sharing:\n  spans:\n  - layers: 0-3": "line 3: layer 0 cannot borrow, since no layer is before it",
    "sharing:\n  spans:\n  - layers: 4-5\n    source: 4": "line 4: source 4 is not before layers 4-5",
    "sharing:\n  spans:\n  - layers: 4-5\n    source: -1": "line 4: sharing.spans[0].source should be 0 or more",
    "sharing:\n  spans:\n  - layers: 4-5\n    source: '3'": "line 4: sharing.spans[0].source should be a whole",
    "sharing:\n  map: 3": "line 2: map should list heads for each layer",
    "sharing:\n  map: {}": "line 2: the map shares nothing",
    "sharing:\n  map:\n    3: [null, null]": "line 2: the map shares nothing",
    "sharing:\n  map:\n    3: []": "line 3: layer 3 should list null or [source layer, source head]",
    "sharing:\n  map:\n    3: [[2, 1], 4]": "line 3: layer 3 head 1 should be null or [source layer, source head]",
    "sharing:\n  map:\n    3: [[2, 1, 0]]": "line 3: layer 3 head 0 should be null or",
    "sharing:\n  map:\n    3: [[2, -1]]": "line 3: layer 3 head 0 should be null or",
    "sharing:\n  map:\n    3: [[2, 1.0]]": "line 3: layer 3 head 0 should be null or",
    "sharing:\n  map:\n    2: [[1, 0]]\n    3:\n    - null\n    - [3, 1]": "line 6: layer 3 head 1 borrows from layer "
    "3, which is not before it",
    "sharing:\n  map:\n    x3: [[2, 1]]": "line 3: 'x3' is not a layer",
    "sharing:\n  map:\n    3: [[2, 1]]\n    '3': [[1, 1]]": "line 4: layer 3 is listed twice",
    "sharing: {search: {}}": "line 1: search needs exactly one of key_cache, max_perplexity_increase, but has none",
    "sharing: {search: {key_cache: 5%, max_perplexity_increase: 2%}}": "line 1: search needs exactly one of",
    "sharing: {search: {key_cache: 0%}}": "line 1: sharing.search.key_cache: 0% leaves nothing to do",
    "sharing: {search: {key_cache: 100%}}": "line 1: sharing.search.key_cache: 100% is impossible",
    "sharing: {search: {key_cache: 0.25}}": "line 1: sharing.search.key_cache: 0.25 is not a percentage; write it "
    "with a percent sign",
    "sharing: {search: {max_perplexity_increase: -2%}}": "line 1: sharing.search.max_perplexity_increase: '-2%' is "
    "not a percentage",
    "search: {cache: 50%}": "line 1: the key 'at' is missing under search",
    "search:\n  at: 4096": "line 1: search needs exactly one of cache, max_perplexity_increase, but has none of them",
    "search:\n  cache: 5%\n  max_perplexity_increase: 2%\n  at: 9": "line 1: search needs exactly one of",
    "search:\n  cache: 0%\n  at: 9": "line 2: search.cache: 0% leaves nothing to do",
    "search:\n  cache: 100%\n  at: 9": "line 2: search.cache: 100% is impossible",
    "search:\n  cache: 50\n  at: 9": "line 2: search.cache: 50 is not a percentage",
    "search:\n  cache: 5%\n  at: 0": "line 3: search.at should be 1 or more, not 0",
    "search:\n  cache: 5%\n  at: many": "line 3: search.at should be a whole number, not 'many'",
    "search:\n  key_cache: 5%\n  at: 9": "line 2: unknown key 'key_cache' under search; did you mean 'cache'?",
    SPANS + "\nsearch: {cache: 5%, at: 9}": "line 1: a recipe needs exactly one of search, sharing, plan, but has "
    "search and sharing",
    SPANS + "refit: lasso": "line 2: refit should be 'none' or 'ridge', not 'lasso'",
    SPANS + "gate: 5%": "line 2: gate should be a mapping of keys and values, not '5%'",
    SPANS + "gate:\n  max_perplexity_increase: 101%": "line 3: gate.max_perplexity_increase: 101% is more than 100%",
    SPANS + "calibration: {sequences: 0}": "line 2: calibration.sequences should be 1 or more, not 0",
    SPANS + "calibration: {length: 1}": "line 2: calibration.length should be 2 or more, not 1",
    SPANS + "calibration: {length: yes}": "line 2: calibration.length should be a whole number, not 'yes'",
    SPANS + "calibration: {text: a.pdf}": "line 2: calibration.text: 'a.pdf' is not builtin",
    SPANS + "calibration: {text: 'hub:'}": "line 2: calibration.text: 'hub:' is not builtin",
    SPANS + "description: [a]": "line 2: description should be text, not ['a']",
    "- 1": "line 1: a recipe is a mapping of keys (description, search, sharing,",
    "": " is empty",
    "# nothing\n": " is empty",
    "a:\n  b: [1": "line 2: expected ',' or ']'",
    "a: 1\n\tb: 2": "line 2: found character '\\t'",
    "a: 1\n---\nb: 2": "line 2: expected a single document in the stream, but found another document",
    "a: 1\nb: !!python/object/apply:os.system [x]": "line 2: tags (!name) are not supported",
    "a: 1\nb: \x07": "line 2: the character '\\x07' is not allowed",
    "a: &a [1]\nb: *a": "line 1: anchors and aliases",
    "? [a]\n: b": "line 1: a key must be a word or a number",
    "[" * 5000: ": nested too deeply",
    "[" * 30 + "]" * 30: "line 1: nested too deeply",
    "a: " + "9" * 5000: ": not valid YAML: ",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:40]))
def test_refused_with_one_line_that_names_the_line(text):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    message = str(caught.value).removeprefix("r.yaml")
    assert message.removeprefix(", ").startswith(REFUSED[text])
    assert message != str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_1_1_surprises_stay_text():
    recipe = parse_recipe(SPANS + "description: 1:30", "r")
    assert recipe.description == "1:30"
    with pytest.raises(RecipeError, match="should be a whole number, not '010'"):
        parse_recipe("sharing: {spans: [{layers: 20, source: 010}]}", "r")


def test_layers_and_kv_groups_are_texts_in_json_and_numbers_in_yaml():
    plan = '{"plan": {"27": {"0": {"share": [[26, 4]]}}, "28": "drop"}}'
    assert parse_recipe(plan, "r.json").plan == {27: {0: {"share": [[26, 4]]}}, 28: "drop"}
    with pytest.raises(RecipeError, match=re.escape("r.yaml, line 1: '0' is not a KV group of layer 27")):
        parse_recipe(plan, "r.yaml")
    with pytest.raises(RecipeError, match=re.escape("r.json, line 2: there is no treatment 'shar'")):
        parse_recipe(plan.replace("share", "shar").replace('{"0"', '\n{"0"'), "r.json")


def test_json_is_read_even_with_tabs(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{\n\t"sharing": {\n\t\t"map": {"2": [[1, 0], null]}\n\t}\n}')
    assert load_recipe(str(path)).sharing.map == {2: ((1, 0), None)}


def test_unreadable_files(tmp_path):
    latin, folder, empty, absent = (tmp_path / f"{name}.yaml" for name in ("latin", "folder", "empty", "absent"))
    latin.write_bytes("refit: none\ndescription: caf\u00e9".encode("latin-1"))
    folder.mkdir()
    empty.touch()
    cases = {
        latin: f"{latin}, line 2: the file is not UTF-8 text",
        folder: f"'{folder}' is a folder, not a recipe; give the .yaml file itself.",
        empty: f"{empty} is empty; a recipe needs at least one of the keys 'search', 'plan' and 'sharing'.",
        absent: f"There is no recipe file '{absent}'. `sa-convert recipes` lists the shipped ones.",
        "a\0.yaml": "Cannot read the recipe 'a\0.yaml': embedded null byte.",
        "/dev/zero": "'/dev/zero' is larger than 16 MiB, which no recipe is.",
    }
    for path, message in cases.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(str(path))
        assert str(caught.value) == message


def test_names_and_files_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "late-span").write_text(SPANS + "description: mine")
    (tmp_path / "mine").write_text(SPANS + "description: mine")
    assert load_recipe("./late-span").description == "mine"
    assert load_recipe("late-span").description != "mine"
    with pytest.raises(RecipeError, match=r"recipe 'mine'; to use the file of that name, write \./mine\."):
        load_recipe("mine")
    with pytest.raises(RecipeError, match=r"no shipped recipe 'lat-span'; did you mean 'late-span'\? `sa"):
        load_recipe("lat-span")


def test_shipped_recipes_are_those_of_the_contract():
    spans = {"llama-2-7b-23-26", "llama-2-7b-27-30", "llama-3-8b-23-26", "llama-3-8b-27-30", "late-span"}
    search = {"shared-light": 0.10, "shared-balanced": 0.25, "shared-aggressive": 0.40}
    cache = {"light": 0.25, "balanced": 0.50, "aggressive": 0.75, "within-2pct": None}
    assert set(shipped_recipes()) == spans | set(search) | set(cache)
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.description
        assert "search" in recipe.needs if name in {**search, **cache} else not recipe.needs
    for name, part in search.items():
        assert load_recipe(name).sharing.search.key_cache == part
    for name, part in cache.items():
        assert load_recipe(name).search.cache == part
        assert load_recipe(name).search.at == 4096
    assert load_recipe("within-2pct").search.max_perplexity_increase == 0.02


def test_dumped_recipes_load_as_the_same():
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert parse_recipe(dump_recipe(recipe), "again.yaml") == recipe


def test_a_resolved_recipe_loads_as_the_same_and_keeps_heads_on_a_line():
    sharing = SharingMap({27: ((26, 4), None, (22, 3)), 28: tuple((20, head) for head in range(64))})
    recipe = parse_recipe("description: 'yes: no # %'\n" + SPANS + "gate: {max_perplexity_increase: 7%}", "r.yaml")
    text = dump_recipe(recipe.resolved(recipe_of(sharing)))
    again = parse_recipe(text, "recipe.yaml")
    assert "    27: [[26, 4], null, [22, 3]]\n" in text
    assert "gate: {max_perplexity_increase: 7%}\n" in text
    assert "calibration" not in text
    assert SharingMap.from_json(again.sharing.map) == sharing
    assert again.gate == recipe.gate
    assert again.description == "yes: no # %"
    assert dump_recipe(again.resolved(recipe_of(sharing))) == text


@pytest.mark.parametrize(
    "value", ["no", "1:30", "1e5", "~", "null", "a\nb", "  x", "0x1F", "12", "é\u2028", "- a", "{", "%x"]
)
def test_any_description_survives(value):
    recipe = Recipe.model_validate({"description": value, "sharing": {"map": {"1": [[0, 0]]}}})
    assert parse_recipe(dump_recipe(recipe), "r.yaml") == recipe


def test_layers_of_other_stacks_are_refused_with_their_line():
    recipe = parse_recipe("sharing:\n  map:\n    encoder.3: [[1, 0]]", "r.yaml")
    geometry = ModelGeometry((LayerGeometry(heads=1, groups=1, head_dim=8),) * 4)
    told = r"^r\.yaml, line 3: there is no layer 'encoder\.3'; this model has one kind of .*: write 3$"
    with pytest.raises(RecipeError, match=told):
        sharing_of(recipe, geometry)
    recipe = parse_recipe("sharing:\n  map:\n    3: [[1, 0]]", "r.yaml")
    stacks = [LayerGeometry(heads=1, groups=1, head_dim=8, stack=name) for name in ("encoder", "decoder") * 4]
    geometry = ModelGeometry(tuple(sorted(stacks, key=lambda layer: layer.stack, reverse=True)))
    with pytest.raises(
        RecipeError, match=r"line 3: there is no layer '3'; .*stacks encoder, decoder: write decoder\.3"
    ):
        sharing_of(recipe, geometry)


def test_the_recipes_in_the_docs_are_valid():
    page = (ROOT / "docs" / "recipes.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        assert parse_recipe(block, "recipes.md").description
    for name in shipped_recipes():
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert row.endswith(f" {format_percent(load_recipe(name).gate.max_perplexity_increase)} |")
