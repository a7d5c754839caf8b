"""The table of families: what its files say, what is wrong with them, and that each is read only if it is asked for."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields

import pytest

from sa_convert.families.family import Modules, Stack, Windows
from sa_convert.families.model_classes import ending_of
from sa_convert.families.table import FAMILIES, HOME, families_in
from sa_convert.read.gguf_architecture import ARCHITECTURES, architectures_in
from sa_convert.read.gguf_architecture import HOME as GGUF

FILES = sorted(HOME.glob("*.json"))


def test_there_is_one_for_each_file():
    assert len(FAMILIES) == len(FILES) >= 108
    assert {"llama", "lama", None} & set(FAMILIES) == {"llama"}
    assert FAMILIES.get("../models/llama") is None


def paths(entry: dict, before: tuple = ()) -> Iterator[tuple]:
    """Where the values of an entry stand: ("modules", "query")."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from paths(value, (*before, key))
        elif before or key not in ("like", "note", "config_class", "default_class", "model_type"):
            yield (*before, key)


@pytest.mark.parametrize("file", [*FILES, *GGUF.glob("*.json")], ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_file_says_only_what_counts(file, tmp_path):
    """Every value changes the entry: what an entry is like, and what is usual (of families, Llama), is not repeated."""
    entries_in, known = (families_in, FAMILIES) if file.parent == HOME else (architectures_in, ARCHITECTURES)
    said = other = json.loads(file.read_text(encoding="utf-8"))
    while "like" in other:
        neighbour = file.with_name(f"{other['like']}.json")
        shutil.copy(neighbour, tmp_path)
        other = json.loads(neighbour.read_text(encoding="utf-8"))
    for path in paths(said):
        without = inner = json.loads(json.dumps(said))
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        (tmp_path / file.name).write_text(json.dumps(without))
        try:
            assert entries_in(tmp_path)[file.stem] != known[file.stem], path
        except ValueError as error:  # an entry without what every entry has
            if "is missing" not in str(error):
                raise


def test_the_carried_code_takes_for_granted_what_the_table_does():
    """config.json holds what differs from Llama; both have to know what that is."""
    from sa_convert.runtime.modeling_shared_attention import MODULES

    defaults = {each.name: each.default for each in fields(Modules)}
    assert {**defaults, **MODULES} == defaults
    left_out = set(defaults) - set(MODULES)
    assert not left_out & {key for family in FAMILIES.values() for key in family.modules.to_json()}


def test_classes_end_as_the_table_of_heads_knows():
    assert all(ending_of(family.default_class) for family in FAMILIES.values())


def test_one_family_is_read_without_the_others(tmp_path):
    for name in ("bart", "marian", "llama"):
        shutil.copy(HOME / f"{name}.json", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    families = families_in(tmp_path)
    assert list(families) == ["bart", "broken", "llama", "marian"]
    assert families["marian"].modules == FAMILIES["bart"].modules
    with pytest.raises(json.JSONDecodeError):
        families["broken"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules": {"qery": "q"}}, r"new\.json: modules\.qery is unknown; there are layers, attention,"),
        ({"windows": {"period": "4"}}, r"new\.json: windows\.period is '4', which is no int"),
        ({"tokenizer": {"registered": True}}, r"new\.json: tokenizer\.registered is True, which is no str"),
        ({"depht": "n_layer"}, r"new\.json: depht is unknown"),
        (
            {"modules": {"stacks": {"encoder": {"layer": "x"}}}},
            r"new\.json: modules\.stacks\.encoder\.layer is unknown",
        ),
        ({"like": "nothing"}, r"new\.json: 'like' names 'nothing', which is no other entry"),
        ({"like": "new"}, r"new\.json: 'like' names 'new', which is no other entry"),
        ({"like": "old"}, r"old\.json: 'like' names 'new', which is no other entry"),
        ({"config_class": ...}, r"new\.json: config_class is missing"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, changes, said):
    entry = {"config_class": "NewConfig", "default_class": "NewForCausalLM"}
    (tmp_path / "old.json").write_text(json.dumps(entry | {"like": "new"}))
    new = {key: value for key, value in (entry | changes).items() if value is not ...}
    (tmp_path / "new.json").write_text(json.dumps(new))
    with pytest.raises(ValueError, match=said):
        families_in(tmp_path)["new"]


def test_a_family_takes_over_what_it_does_not_say(tmp_path):
    entry = {"config_class": "AConfig", "default_class": "AForCausalLM"}
    stacks = {"encoder": {"layers": "a", "attention": "b"}, "decoder": {"layers": "c", "attention": "d"}}
    first = entry | {"modules": {"stacks": stacks, "query": "q", "key": "k"}, "windows": {"size": 8}}
    second = entry | {
        "like": "first",
        "modules": {"stacks": {"decoder": {"cross": True}}, "key": None},
        "windows": None,
    }
    (tmp_path / "first.json").write_text(json.dumps(first))
    (tmp_path / "second.json").write_text(json.dumps(second))
    found = families_in(tmp_path)["second"]
    assert found.modules == Modules(
        stacks=(Stack("encoder", "a", "b"), Stack("decoder", "c", "d", cross=True)), query="q"
    )
    assert found.windows == Windows()
    assert (found.model_type, found.config_class) == ("second", "AConfig")
