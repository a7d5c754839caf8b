"""A model with windows, converted by the command line: what validation, report, card and `inspect` say of it."""

import json
from pathlib import Path

import pytest
import yaml

from support.processes import run_cli
from support.validation_models import save_base

SINKS, TOKENS = 4, 60
SEEN = SINKS + TOKENS
GROUP = 16 * 2 * 4
"""Bytes that a token adds to the cache of one KV group: a key and a value of 16 elements in float32."""
PLAN = {
    layer: {group: {"window": {"sinks": SINKS, "tokens": TOKENS}} for group in groups}
    for layer, groups in {1: (0, 1), 3: (1,)}.items()
}
WINDOWED, GROUPS, AT = 3, 10, 256


def cached(tokens: int) -> dict[str, int]:
    """Bytes of the cache of so many tokens, before and after."""
    after = ((GROUPS - WINDOWED) * tokens + WINDOWED * min(tokens, SEEN)) * GROUP
    return {"before": GROUPS * tokens * GROUP, "after": after}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def recipe(base) -> Path:
    file = base.parent / "recipe.yaml"
    limits = {"max_perplexity_increase": "50%", "max_copying_increase": 0.5}
    file.write_text(yaml.safe_dump({"plan": PLAN, "gate": limits}))
    return file


@pytest.fixture(scope="module")
def converted(base, recipe) -> Path:
    out = base.parent / "out"
    done = run_cli("convert", base, "--recipe", recipe, "-o", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (base.parent / "shown.txt").write_text(done.stdout)
    return out


def test_report(converted):
    report = json.loads((converted / "report.json").read_text())
    assert report["treatments"]["window"] == {"groups": WINDOWED}
    cache = report["cache_bytes"]
    assert (cache["at"], cache["measured_at"]) == (AT, AT)
    assert {key: cache[key] for key in ("before", "after")} == cached(AT)
    assert cache["removed"] == pytest.approx(1 - cached(AT)["after"] / cached(AT)["before"], abs=1e-6)
    # Room for tokens that are taken back is no cache that the next token needs; it is told beside it.
    assert cache["room"] >= 0
    average = {key: value // AT for key, value in cached(AT).items()}
    assert report["savings"]["cache_bytes_per_token"] == {**average, "average_over": AT}
    assert report["decode_check"]["same_greedy_tokens"] is True
    assert report["long_text"]["length"] == AT
    assert report["long_text"]["by_position"][0]["before"] == report["long_text"]["by_position"][0]["after"]
    assert report["long_text"]["by_position"][-1]["before"] != report["long_text"]["by_position"][-1]["after"]
    assert {"64", "128"} <= report["copying"].keys()
    assert report["gate"] == {"max_perplexity_increase": 0.5, "max_copying_increase": 0.5, "passed": True}


def test_what_people_read(converted):
    shown = (converted.parent / "shown.txt").read_text()
    card = (converted / "README.md").read_text()
    saved = f"{-(1 - cached(AT)['after'] / cached(AT)['before']):+.1%}"
    assert f"Cache at {AT}" in shown
    assert f"({saved}), measured" in shown
    assert f"**cache at {AT} tokens {saved}, parameters +0.0%, perplexity " in card
    assert f"| cache of {AT} tokens (measured) |" in card
    assert "| copying, 128 tokens back |" in card
    assert "| needle at" in card
    assert "keys in the cache" not in card


def test_the_same_folder_again(converted, base):
    again = base.parent / "again"
    done = run_cli("convert", base, "--recipe", converted / "recipe.yaml", "-o", again, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / "report.json").read_text()) for folder in (converted, again)]
    assert found[0] == found[1]


def test_without_validation_the_cache_is_computed(base, recipe):
    done = run_cli("convert", base, "--recipe", recipe, "-o", base.parent / "unseen", "--no-validate", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    cache = report["cache_bytes"]
    assert {key: cache[key] for key in ("before", "after")} == cached(AT)
    assert (cache["measured_at"], cache["room"]) == (None, None)
    assert [report[key] for key in ("long_text", "needle", "copying", "gate")] == [None] * 4
    shown = run_cli("convert", base, "--recipe", recipe, "-o", base.parent / "unseen", "--no-validate", "--overwrite")
    assert "computed" in shown.stdout


def test_a_dry_run_prices_several_lengths(base, tmp_path):
    far = save_base(tmp_path / "far", max_position_embeddings=6000)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"plan": PLAN}))
    done = run_cli("convert", far, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cache_bytes"].keys() == {"512", "2048", "4096", "6000"}
    for tokens, sizes in found["cache_bytes"].items():
        assert {key: sizes[key] for key in ("before", "after")} == cached(int(tokens))
    average = {key: value // 4096 for key, value in cached(4096).items()}
    assert found["savings"]["cache_bytes_per_token"] == {**average, "average_over": 4096}
    shown = run_cli("convert", far, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run").stdout
    assert "cache at 4,096" in shown
    assert "average over 4,096 tokens" in shown


def test_inspect_prices_a_converted_folder(converted):
    done = run_cli("inspect", converted, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache_bytes"] == {str(AT): cached(AT)["after"]}
    assert f"of {AT} tokens" in run_cli("inspect", converted).stdout


def test_evaluate_crosses_the_window(converted, base):
    arguments = ["--sequences", 2, "--length", 64, "--long", 200, "--device", "cpu", "--json"]
    done = run_cli("evaluate", converted, "--against", base, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["decode_check"]["passed"] is True
    # The window of 64 tokens changes nothing of the first of them.
    positions = found["change"]["long_text"]["by_position"]
    assert [at["increase"] for at in positions[:2]] == [0, 0]
    assert positions[-1]["increase"] != 0


def test_a_real_cache_of_all_treatments_is_as_computed(base, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    plan = {
        1: {0: {"low_rank": {"keys": 6}}, 1: {"window": {"sinks": 2, "tokens": 30}}},
        2: "drop",
        3: {0: {"share": [[0, 0], [0, 1]]}, 1: {"window": {"sinks": 4, "tokens": 60}}},
    }
    recipe.write_text(yaml.safe_dump({"plan": plan, "gate": {"max_perplexity_increase": "100%"}}))
    # Of ten KV groups' keys and values of 16 elements: four stay, and what the plan leaves of the others.
    whole = 4 * AT * 2 * 16 + AT * (6 + 16) + 32 * 2 * 16 + AT * 16 + 64 * 2 * 16
    for options, measured_at in (((), AT), (("--no-validate", "--overwrite"), None)):
        done = run_cli("convert", base, "--recipe", recipe, "-o", out, "--device", "cpu", "--json", *options)
        assert done.returncode == 0, done.stderr
        cache = json.loads(done.stdout)["cache_bytes"]
        assert (cache["after"], cache["measured_at"]) == (whole * 4, measured_at)
        assert cache["before"] == 10 * AT * 2 * 16 * 4
