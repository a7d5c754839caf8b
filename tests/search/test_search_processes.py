"""Several processes share a search: they find what one finds, write once, and end together."""

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from support.planted import save_planted, save_reader
from support.processes import ROOT, run_cli, run_in_two

CALIBRATION = {"sequences": 8, "length": 64}
WHOLE_CACHE = {
    "search": {"cache": "40%", "at": 400},
    "treatments": ["window", "low_rank", "share"],
    "calibration": CALIBRATION,
    "gate": {"max_perplexity_increase": "90%"},
}
REFIT = {
    "sharing": {"search": {"key_cache": "25%"}},
    "refit": "ridge",
    "calibration": CALIBRATION,
    "gate": {"max_perplexity_increase": "99%"},
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return save_reader(tmp_path_factory.mktemp("models") / "reader", 1, 2)


def write_recipe(path, **keys):
    path.write_text(json.dumps(keys))  # JSON is YAML
    return path


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same(one, two):
    """One conversion and another one: the same plan, and weights but for rounding."""
    assert (one / "recipe.yaml").read_text() == (two / "recipe.yaml").read_text()
    expected, found = tensors_of(one), tensors_of(two)
    assert expected.keys() == found.keys()
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-5


def test_accelerate_launches_two_that_write_what_one_writes(reader, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", **WHOLE_CACHE)
    alone = run_cli("convert", reader, "--recipe", recipe, "-o", tmp_path / "one", "--no-validate")
    assert alone.returncode == 0, alone.stderr
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    asked = ["convert", reader, "--recipe", recipe, "-o", tmp_path / "two", "--no-validate"]
    done = subprocess.run(
        [*launcher, "--main_process_port", "0", "-m", "sa_convert", *map(str, asked)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == alone.stdout.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert_same(tmp_path / "one", tmp_path / "two")
    treated = json.loads((tmp_path / "two" / "report.json").read_text())["treatments"]
    assert set(treated) == {"window", "low_rank", "share"}


def test_two_refit_as_one_does(tmp_path):
    base = save_planted(tmp_path / "base", {0: 1})
    recipe = write_recipe(tmp_path / "recipe.json", **REFIT)
    alone = run_cli("convert", base, "--recipe", recipe, "-o", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    first, second = run_in_two("convert", base, "--recipe", recipe, "-o", tmp_path / "two")
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert first.stdout.count("Written to") == 1
    assert (second.stdout, second.stderr) == ("", "")
    assert_same(tmp_path / "one", tmp_path / "two")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["refit"]["layers"]
    assert reports[1]["refit"]["share"] == reports[0]["refit"]["share"] > 0


def test_costs_and_figures_of_attention_are_those_of_one(reader, tmp_path):
    treatments = "window,share,merge,linear,drop"
    options = ("--sequences", 5, "--length", 48, "--at", 200, "--treatments", treatments, "--json")
    alone = run_cli("analyze", reader, "-o", tmp_path / "one", *options)
    assert alone.returncode == 0, alone.stderr
    first, second = run_in_two("analyze", reader, "-o", tmp_path / "two", *options)
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    one, two = (json.loads(told) for told in (alone.stdout, first.stdout))
    assert len(one["costs"]) == len(two["costs"]) > 0
    for part in ("costs", "attention", "frontier"):
        assert_close(one[part], two[part])


def assert_close(one, two):
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_close(left, right)
    else:
        assert two == (pytest.approx(one, rel=1e-3, abs=1e-7) if isinstance(one, float) else one)


def test_layer_by_layer_they_draw_as_one_does(reader, tmp_path):
    """Random directions take the place of gradients there, and come of one generator."""
    recipe = write_recipe(tmp_path / "recipe.json", **{**WHOLE_CACHE, "treatments": ["window", "share"]})
    options = ("--recipe", recipe, "--no-validate", "--layer-by-layer")
    alone = run_cli("convert", reader, "-o", tmp_path / "one", *options)
    assert alone.returncode == 0, alone.stderr
    done = run_in_two("convert", reader, "-o", tmp_path / "two", *options)
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_dry_run_tells_once(reader, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", **{**WHOLE_CACHE, "treatments": ["window"]})
    first, second = run_in_two("convert", reader, "--recipe", recipe, "-o", tmp_path / "out", "--dry-run", "--json")
    assert (first.returncode, second.returncode) == (0, 0), (first.stderr, second.stderr)
    assert json.loads(first.stdout)["cache_bytes"]["512"]["removed"] > 0.4
    assert second.stdout == ""
    assert not (tmp_path / "out").exists()


def errors_of(done):
    return [line for one in done for line in one.stderr.splitlines() if line.startswith("Error")]


def test_the_gate_refuses_for_all(reader, tmp_path):
    gate = {"max_perplexity_increase": "0.0001%"}
    recipe = write_recipe(tmp_path / "recipe.json", **{**WHOLE_CACHE, "treatments": ["window"], "gate": gate})
    done = run_in_two("convert", reader, "--recipe", recipe, "-o", tmp_path / "out")
    assert [one.returncode for one in done] == [3, 3]
    assert len(errors_of(done)) == 1
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_what_both_find_wrong_is_told_once(reader, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.json", search={"cache": "99%", "at": 400}, calibration=CALIBRATION)
    done = run_in_two("convert", reader, "--recipe", recipe, "-o", tmp_path / "out")
    assert [one.returncode for one in done] == [1, 1]
    assert len(errors_of(done)) == 1
    assert "recipe.json, line 1: 99% of the cache is more than" in errors_of(done)[0]


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("raise SaConvertError('the second has no memory')", "Error: the second has no memory"),
        (f"os.kill(os.getpid(), {int(signal.SIGKILL)})", "Error: Another process of the launch has ended without"),
    ],
    ids=["says so", "is killed"],
)
def test_the_second_ends_the_first(reader, tmp_path, fails, told):
    recipe = write_recipe(tmp_path / "recipe.json", **WHOLE_CACHE)
    prelude = f"""
from sa_convert.errors import SaConvertError
from sa_convert.observe.probe import Probe
if rank == 1:
    def fail(self, call, value):
        {fails}
    Probe.attend = fail
"""
    done = run_in_two("convert", reader, "--recipe", recipe, "-o", tmp_path / "out", prelude=prelude)
    assert done[0].returncode == 1
    assert done[1].returncode in (1, -signal.SIGKILL)
    assert [line[: len(told)] for line in errors_of(done)] == [told]
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_a_recipe_that_heals_is_healed_by_all(tmp_path):
    base = save_planted(tmp_path / "base", {0: 1})
    spans = {"spans": [{"layers": "3", "source": 2}]}
    heal = {"tokens": "2k", "length": 64, "rows": 4}
    recipe = write_recipe(tmp_path / "recipe.json", sharing=spans, heal=heal, gate={"max_perplexity_increase": "99%"})
    done = run_in_two("convert", base, "--recipe", recipe, "-o", tmp_path / "out")
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["heal"]["processes"] == 2
