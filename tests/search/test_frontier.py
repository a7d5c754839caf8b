"""`sa-convert analyze`: the frontier of a search over several treatments, and what stands in its folder."""

import csv
import json
import math

import pytest
from PIL import Image

from sa_convert.domain.change import Change
from sa_convert.domain.frontier import COLUMNS, Frontier, FrontierPoint
from sa_convert.domain.plan import Plan
from sa_convert.plan.recipe_file import load_recipe
from support.cli_cases import refused
from support.validation_models import save_base

SMALL = ("--sequences", 6, "--length", 48, "--at", 200)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def analyzed(tiny, tmp_path_factory, cli):
    output = tmp_path_factory.mktemp("out") / "analysis"
    options = ("--cache", "40%", "--treatments", "window,share", "--json")
    return cli("analyze", tiny, "-o", output, *SMALL, *options), output


@pytest.fixture(scope="module")
def rows(analyzed):
    with (analyzed[1] / "frontier.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_line_for_each_point_of_each_set_of_treatments(analyzed, rows):
    assert analyzed[0].returncode == 0, analyzed[0].stderr
    assert list(rows[0]) == list(COLUMNS)
    assert list(dict.fromkeys(row["treatments"] for row in rows)) == ["window+share", "window", "share"]
    for kind in ("window+share", "window", "share"):
        saved = [float(row["cache_removed"]) for row in rows if row["treatments"] == kind]
        assert saved == sorted(saved)
        assert all(0 < part < 1 for part in saved)
    together = [float(row["cache_removed"]) for row in rows if row["treatments"] == "window+share"]
    assert together[-1] > 0.5
    shared = [float(row["cache_removed"]) for row in rows if row["treatments"] == "share"]
    assert shared[-1] <= 0.4 + 1e-9  # four of five layers may borrow, and keys are half of the cache


def test_each_point_has_a_recipe_that_searches_nothing_and_saves_as_much(analyzed, rows, cli, tiny, tmp_path):
    output = analyzed[1]
    for row in rows:
        recipe = load_recipe(str(output / row["recipe"]))
        assert recipe.search is None
        assert row["at"] == "200"
    for row in (rows[0], next(row for row in rows if row["treatments"] == "window")):
        dry = cli("convert", tiny, "--recipe", output / row["recipe"], "-o", tmp_path / "x", "--dry-run", "--json")
        assert dry.returncode == 0, dry.stderr
        assert "calibrating" not in dry.stderr
    # Of the tiny model: 5 layers of 2 KV groups of 16, keys and values, 4 bytes each.
    assert int(rows[0]["cache_bytes_before"]) == 200 * 5 * 2 * 16 * 2 * 4


def test_recipe_yaml_is_the_point_that_was_asked_for(analyzed, rows):
    output = analyzed[1]
    asked = next(row for row in rows if row["recipe"] == "cache-40.yaml")
    assert float(asked["cache_removed"]) >= 0.4
    chosen, same = (load_recipe(str(output / name)) for name in ("recipe.yaml", "cache-40.yaml"))
    assert chosen.plan == same.plan
    assert chosen.sharing == same.sharing


def test_the_json_says_the_same_as_the_table(analyzed, rows):
    content = json.loads(analyzed[0].stdout)
    assert content == json.loads((analyzed[1] / "analysis.json").read_text())
    points = content["frontier"]["points"]
    assert content["frontier"]["at"] == 200
    assert [point["recipe"] for point in points] == [row["recipe"] for row in rows]
    for point, row in zip(points, rows, strict=True):
        assert point["loss_rise"]["mean"] == pytest.approx(float(row["loss_rise"]))
        assert float(row["perplexity_increase"]) == pytest.approx(math.expm1(float(row["loss_rise"])), abs=1e-5)
        assert max(point["copying_rise"].values()) == pytest.approx(float(row["copying_rise"]))
    offers = {(unit["layer"], *unit["groups"]): unit["offers"] for unit in content["units"]}
    assert {offer["treatment"] for offer in offers[0, 0]} == {"window"}
    assert {offer["treatment"] for offer in offers[4, 1]} == {"window", "share"}
    assert offers[4, 1][0]["arguments"] == {"sinks": 4, "tokens": 64}


def test_figures_show_something(analyzed):
    for name in ("frontier.png", "treatments.png", "costs.png"):
        with Image.open(analyzed[1] / "figures" / name) as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_refusals(cli, tiny, tmp_path):
    output = tmp_path / "out"
    unknown = cli("analyze", tiny, "-o", output, "--treatments", "windows")
    assert unknown.returncode == 2
    assert "there is no treatment 'windows': choose among window" in unknown.stderr
    refused(cli("analyze", tiny, "-o", output, "--at", 100_000), 1, "positions for 256 tokens", output)


def test_the_worst_distance_is_told():
    point = FrontierPoint(("window",), Plan(), Change(100, 40), 0.01, 0.002, {64: 0.1, 512: 0.3}, "w.yaml")
    (row,) = Frontier(512, (point,)).rows()
    told = dict(zip(COLUMNS, row, strict=True))
    assert (told["copying_rise"], told["copying_distance"], told["cache_removed"]) == (0.3, 512, 0.6)
