"""The gate: what it measures of a model whose use depends on the length, what it refuses, and what it says then."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sa_convert.domain.change import Change
from sa_convert.domain.long_context import LongChange, LongContext, NeedleLosses, PositionLosses
from sa_convert.domain.losses import LossChange, Losses
from sa_convert.domain.model import RunOptions
from sa_convert.domain.recipe import Gate
from sa_convert.domain.report import CopyingReport, DecodeCheck, PerplexityReport, Validation
from sa_convert.errors import GateRefused, RecipeError
from sa_convert.jobs.evaluating import EvaluateOptions, evaluate
from sa_convert.measure.quality.gate import validate
from sa_convert.measure.quality.questions import Use
from sa_convert.measure.quality.verdict import judged, refuse_if_failed
from sa_convert.plan.recipe_file import dump_recipe, parse_recipe
from sa_convert.texts.text import load_text
from support.cli_cases import refused
from support.processes import run_cli
from support.validation_models import save_base, save_converted

SMALL = {"sequences": 3, "length": 96, "run": RunOptions(device="cpu")}
TOKEN = 5 * 2 * 16 * 2 * 4
"""Bytes that a token adds to the base's cache: 5 layers of 2 KV groups of 16 elements, key and value, float32."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def converted(base) -> Path:
    return save_converted(base, base.parent / "converted")


def lost(*rises: float) -> LossChange:
    """A loss of 2 before, and so much more on each sample."""
    return LossChange(Losses((2.0,) * len(rises)), Losses(tuple(2 + rise for rise in rises)))


def long_context(change: LossChange) -> LongChange:
    def of(losses: Losses) -> LongContext:
        return LongContext(2048, losses, (PositionLosses(0, 2048, losses),), (NeedleLosses(0.1, losses),))

    return LongChange(of(change.before), of(change.after))


MEASURED = Validation(
    perplexity=PerplexityReport("text", 100, 10.0, 10.1, "float32"),
    decode_check=DecodeCheck(1e-5, True, 1e-3),
    gate=None,
    cache_bytes_per_token=Change(TOKEN, TOKEN),
    copying=CopyingReport(128, 100, 2.0, 2.01, ((128, lost(0.01, 0.03)), (512, lost(0.30, 0.34)), (1024, lost(-1.0)))),
    long=long_context(lost(0.04, 0.06)),
)


def test_what_a_use_adds(base, converted):
    text = load_text("builtin")
    found = validate(base, converted, text, 0.5, **SMALL, use=Use(at=4096), max_copying_increase=0.5)
    # 256 positions. The headline is a probe of 128 tokens, whatever the distances are.
    assert [distance for distance, _ in found.copying.distances] == [64, 128]
    assert found.copying.period == 128
    assert found.long.before.length == 256
    assert (found.cache.at, found.cache.measured_at) == (256, 256)
    assert (found.cache.before, found.cache.after) == (256 * TOKEN, 256 * (TOKEN - 2 * 2 * 16 * 4))
    assert (found.gate.passed, found.gate.max_copying_increase) == (True, 0.5)
    refuse_if_failed(found)
    # The same as `evaluate` measures.
    options = EvaluateOptions(sequences=2, length=64, device="cpu", long=256)
    evaluated = evaluate(str(converted), str(base), text, options)
    assert evaluated.long_change == found.long
    assert dict(found.copying.distances).items() <= dict(evaluated.copying_change).items()


def test_without_a_use_nothing_is_measured_of_long_text(base, converted):
    found = validate(base, converted, load_text("builtin"), 0.5, **SMALL)
    assert found.long is None
    assert [distance for distance, _ in found.copying.distances] == [128]
    assert (found.cache.at, found.cache.before) == (16, 16 * TOKEN)


def test_short_text_is_measured_in_shorter_sequences(base, converted, tmp_path, capsys):
    def measured(sentences: int) -> int:
        (tmp_path / "short.txt").write_text(" ".join(f"The number {n} and a few words." for n in range(sentences)))
        text = load_text(str(tmp_path / "short.txt"))
        found = validate(base, converted, text, 0.5, use=Use(at=256), sequences=1, length=32, run=SMALL["run"])
        return found.long.before.length

    assert measured(200) == 256
    assert "shorter sequences" not in capsys.readouterr().err
    assert measured(14) == 128
    assert "fewer than 256 tokens; long text is measured in shorter sequences" in capsys.readouterr().err


def verdict(*limits: float | None, **changes) -> str:
    """What the gate says, or "" if it passes."""
    found = judged(replace(MEASURED, **changes), *limits)
    try:
        refuse_if_failed(found)
    except GateRefused as error:
        assert not found.gate.passed
        return str(error)
    assert found.gate is None or found.gate.passed
    return ""


def test_limits_that_are_kept():
    assert verdict(None) == ""
    assert verdict(0.06) == ""
    assert verdict(0.06, 0.33) == ""
    assert verdict(0.02, None, long=None) == ""


def test_long_text_counts_as_short_text_does():
    said = verdict(0.05)
    # exp(0.05) - 1, and the error of two samples 0.02 apart, times its slope.
    assert "perplexity of texts of 2,048 tokens rises by 5.13% ± 1.05% (limit 5%), from 7.39 to 7.77" in said
    assert said.endswith("try a recipe that saves less, or --max-perplexity-increase 6%.")
    both = verdict(0.005)
    assert "perplexity rises by 1.00% (limit 0.5%), from 10.00 to 10.10; perplexity of texts of 2,048" in both


def test_copying_counts_at_every_distance():
    said = verdict(0.06, 0.1)
    assert "copying from the context gets worse by +0.320 ± 0.020 nats at distance 512 (limit 0.1)" in said
    assert "distance 128" not in said
    assert "1,024" not in said
    assert "longer windows on the heads that retrieve, or max_copying_increase: 0.32 under gate" in said
    everywhere = verdict(0.06, 0.0)
    assert "+0.020 ± 0.010 nats at distance 128, +0.320 ± 0.020 nats at distance 512" in everywhere


def test_what_is_not_a_number_is_beyond_every_limit():
    nan, infinite = float("nan"), float("inf")
    assert "copying from the context gets worse by +nan" in verdict(0.06, 0.5, copying=copying(nan))
    assert "copying from the context gets worse by +inf" in verdict(0.06, 0.5, copying=copying(infinite))
    assert "tokens rises by" in verdict(0.06, None, long=long_context(lost(nan, 0.1)))
    assert "tokens rises by inf%" in verdict(0.06, None, long=long_context(lost(infinite, 0.1)))


def copying(rise: float) -> CopyingReport:
    return replace(MEASURED.copying, distances=((64, lost(rise)),))


def test_recipes_name_both_limits():
    gate = "gate: {max_perplexity_increase: 3%, max_copying_increase: 0.1}\n"
    text = "plan: {1: {0: {window: {sinks: 4, tokens: 64}}}}\n" + gate
    recipe = parse_recipe(text, "r.yaml")
    assert recipe.gate == Gate(max_perplexity_increase="3%", max_copying_increase=0.1)
    assert recipe.with_gate(0.5).gate == Gate(max_perplexity_increase="50%", max_copying_increase=0.1)
    assert parse_recipe(dump_recipe(recipe), "r.yaml") == recipe
    assert yaml.safe_load(dump_recipe(recipe))["gate"] == {"max_perplexity_increase": "3%", "max_copying_increase": 0.1}
    plain = parse_recipe("plan: {1: {0: {window: {sinks: 4, tokens: 64}}}}\n", "r.yaml")
    assert yaml.safe_load(dump_recipe(plain))["gate"] == {"max_perplexity_increase": "5%"}
    for wrong, message in (
        ("-0.1", "should be 0.0 or more"),
        ("10%", "should be a number, not '10%'"),
        ("1.0e+999", "should be a finite number"),
        ("true", "should be a number, not True"),
    ):
        with pytest.raises(RecipeError, match=f"r.yaml, line 2: gate.max_copying_increase {message}"):
            parse_recipe(text.replace("0.1", wrong), "r.yaml")


def test_the_length_of_use_stays_when_a_search_is_resolved():
    recipe = parse_recipe("search: {cache: 50%, at: 1000}\n", "r.yaml")
    assert recipe.at == 1000
    resolved = recipe.resolved({"plan": {1: {0: {"window": {"sinks": 4, "tokens": 64}}}}})
    assert resolved.at == parse_recipe(dump_recipe(resolved), "r.yaml").at == 1000
    assert parse_recipe("search: {cache: 50%, at: 1000}\ngate: {at: 500}\n", "r.yaml").at == 500


def test_a_conversion_that_copies_worse_is_refused(base, tmp_path):
    recipe = tmp_path / "r.json"
    gate = {"max_perplexity_increase": "90%", "max_copying_increase": 0.0, "at": 256}
    heads = [[1, head] for head in range(4)]
    recipe.write_text(json.dumps({"sharing": {"map": {4: heads}}, "gate": gate}))
    arguments = ["convert", base, "--recipe", recipe, "-o", tmp_path / "out", "--device", "cpu"]
    refused(
        run_cli(*arguments), 3, r"copying from the context gets worse by \+0\.\d{3} ± .* \(limit 0\)", tmp_path / "out"
    )
    recipe.write_text(json.dumps({"sharing": {"map": {4: heads}}, "gate": {**gate, "max_copying_increase": 9}}))
    passed = run_cli(*arguments, "--json")
    assert passed.returncode == 0, passed.stderr
    report = json.loads(passed.stdout)
    assert report["gate"] == {"max_perplexity_increase": 0.9, "max_copying_increase": 9, "passed": True}
    assert report["cache_bytes"] == {
        "at": 256, "before": 256 * TOKEN, "after": 256 * (TOKEN - 128), "removed": 0.1, "measured_at": 256, "room": 0
    }  # fmt: skip
    assert {"64", "128"} <= report["copying"].keys()
    assert report["copying"]["64"].keys() == {"before", "after", "error"}
    assert report["long_text"]["length"] == 256
    assert [(at["from"], at["to"]) for at in report["long_text"]["by_position"]] == [
        (0, 32), (32, 64), (64, 128), (128, 256)
    ]  # fmt: skip
    assert report["needle"].keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| copying, 128 tokens back |" in card
    assert "| perplexity of 256 tokens |" in card
    assert "may rise" not in card
