"""What cannot be healed is refused in one line, before anything is written."""

import json
import re
import shutil

import pytest

from support.cli_cases import SPAN, edit_json, refused
from support.healing_models import damaged_conversion
from support.processes import run_cli
from support.tiny_models import save_tiny, save_tokenizer, write_recipe


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return damaged_conversion(tmp_path_factory.mktemp("heal"))


def heal(damaged, out, *options, base=True):
    against = ("--against", damaged.base) if base else ()
    return run_cli("heal", damaged.folder, "-o", out, *against, *options)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--length", "4k"), r"--length: 4000 is more than the 512 positions"),
        (("--text", "nowhere.txt"), r"nowhere\.txt: cannot be read"),
        (("--rows", "0"), r"--rows: 0 is no whole number from 1 on"),
        (("--tokens", "many"), r"--tokens: 'many' is no whole number from 1 on, such as 400000, 400k or 2M"),
        (("--rate", "-1"), r"--rate: '-1' is no number above 0"),
        (("--text", "my.pdf"), r"--text: 'my\.pdf' is not builtin"),
        (
            ("--accumulate", "3"),
            r"1 rows cannot be spread over 1 processes in 3 parts each: give --rows 3",
        ),
    ],
)
def test_wrong_options(damaged, tmp_path, options, pattern):
    done = heal(damaged, tmp_path / "out", *options)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert re.search(pattern, last), last
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.healing").exists()


def test_a_base_that_is_not_told(damaged, tmp_path):
    alone = shutil.copytree(damaged.folder, tmp_path / "alone")
    done = run_cli("heal", alone, "-o", tmp_path / "out")
    refused(done, 1, r"report\.json names 'base', which is no folder here: give it with --against", tmp_path / "out")
    (alone / "report.json").unlink()
    done = run_cli("heal", alone, "-o", tmp_path / "out")
    refused(done, 1, r"it has no report\.json: give it with --against", tmp_path / "out")


def test_another_base(damaged, tmp_path):
    save_tiny("llama", tmp_path / "other", seed=5)
    save_tokenizer(tmp_path / "other")
    done = run_cli("heal", damaged.folder, "--against", tmp_path / "other", "-o", tmp_path / "out")
    refused(done, 1, r"other: is not the base of .*: tensor '.*' has other values", tmp_path / "out")


def test_a_model_that_is_not_converted(damaged, tmp_path):
    done = run_cli("heal", damaged.base, "-o", tmp_path / "out")
    refused(done, 1, r"is not a converted model: convert it first", tmp_path / "out")


def test_code_that_is_not_ours(damaged, tmp_path):
    changed = shutil.copytree(damaged.folder, tmp_path / "changed")
    with (changed / "modeling_shared_attention.py").open("a") as file:
        file.write("\n# more\n")
    done = run_cli("heal", changed, "--against", damaged.base, "-o", tmp_path / "out")
    refused(
        done,
        1,
        r"its code modeling_shared_attention\.py is not what this version of",
        tmp_path / "out",
    )


def test_a_place_that_is_taken(damaged, tmp_path):
    (tmp_path / "out").mkdir()
    done = heal(damaged, tmp_path / "out")
    assert done.returncode == 1
    assert "exists already; use --overwrite" in done.stderr
    assert heal(damaged, damaged.folder).returncode == 1


def test_no_room(damaged, tmp_path):
    """As if the disk were nearly full."""
    from sa_convert.errors import OutputError
    from sa_convert.jobs.healing import HealOptions, heal_folder

    def full(folder):
        return type("usage", (), {"free": 1000})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sa_convert.output.disk_space.shutil.disk_usage", full)
        from sa_convert.domain.heal_settings import HealSettings

        with pytest.raises(OutputError, match=r"needs .* of disk space"):
            heal_folder(str(damaged.folder), tmp_path / "out", HealSettings(), HealOptions(against=str(damaged.base)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("heal", "pattern"),
    [
        ({"token": 5}, r"recipe\.json, line \d+: unknown key 'token' under heal; did you mean 'tokens'\?"),
        ({"tokens": 0}, r"line \d+: heal\.tokens: 0 is no whole number from 1 on"),
        ({"train": "all"}, r"line \d+: heal\.train should be 'outputs', 'layers', 'model' or 'lora', not 'all'"),
        ("yes", r"heal should be a mapping of keys and values, not 'yes'"),
        ({"length": 9999}, r"recipe\.json, line \d+: heal\.length: 9999 is more than the 512 positions"),
    ],
)
def test_recipes_name_the_line(damaged, tmp_path, heal, pattern):
    recipe = write_recipe(tmp_path / "recipe.json", SPAN, heal=heal)
    recipe.write_text(json.dumps(json.loads(recipe.read_text()), indent=1))
    done = run_cli("convert", damaged.base, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    refused(done, 1, pattern, tmp_path / "out")


def test_convert_heals_if_the_recipe_says_so(damaged, tmp_path):
    """The step is told in the report and in the resolved recipe; nothing is left beside the result."""
    told = {"tokens": 4000, "length": 64, "rate": 2e-4}
    recipe = write_recipe(tmp_path / "recipe.json", SPAN, heal=told, gate={"max_perplexity_increase": "90%"})
    done = run_cli("convert", damaged.base, "--recipe", recipe, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["heal"]["settings"] == {**told, "text": "builtin+written", "rows": 1}
    assert report["heal"]["curve"][0]["tokens"] == 0
    assert (
        "heal: {tokens: 4000, text: builtin+written, length: 64, rows: 1, rate: 0.0002}"
        in (tmp_path / "out" / "recipe.yaml").read_text()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.json"]


def test_healing_that_does_not_help_is_left_out(damaged, tmp_path):
    from support.healing_models import all_tensors

    told = {"tokens": 2000, "length": 64, "rate": 0.5}
    plain = write_recipe(tmp_path / "plain.json", SPAN)
    ruined = write_recipe(tmp_path / "ruined.json", SPAN, heal=told)
    for recipe in (plain, ruined):
        done = run_cli("convert", damaged.base, "--recipe", recipe, "-o", tmp_path / recipe.stem, "--no-validate")
        assert done.returncode == 0, done.stderr
    assert "Note: healing was left out, since it made the model worse" in done.stderr
    one, two = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "ruined")
    assert all(one[name].equal(two[name]) for name in one)
    report = json.loads((tmp_path / "ruined" / "report.json").read_text())
    assert report["heal"]["kept_tokens"] is None
    assert report["heal"]["refused"]


def test_a_damaged_state_is_said_to_be(damaged, tmp_path):
    state = tmp_path / "out.healing"
    state.mkdir()
    (state / "healing.json").write_text("{")
    done = heal(damaged, tmp_path / "out", "--resume")
    assert done.returncode == 1
    assert "healing.json: is damaged: remove the folder" in done.stderr


def test_quantised_values_are_refused(damaged, tmp_path):
    changed = shutil.copytree(damaged.folder, tmp_path / "changed")
    edit_json(changed / "report.json", base_model={"id": str(damaged.base), "revision": None})
    for file in changed.glob("*.safetensors"):
        content = file.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:size])
        for name, entry in header.items():
            if name == "model.layers.3.self_attn.v_proj.weight":
                entry["dtype"] = "I32"
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (size - 8 - len(text))
        file.write_bytes(content[:8] + text + content[size:])
    done = run_cli("heal", changed, "-o", tmp_path / "out")
    refused(done, 1, r"v_proj\.weight' is I32, which cannot be trained", tmp_path / "out")
