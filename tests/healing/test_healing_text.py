"""Which rows train and which judge, for each text that a recipe may name."""

from types import SimpleNamespace

import pytest
import torch

from sa_convert.domain.heal_settings import BOTH, HealSettings
from sa_convert.heal.healing_text import healing_text
from sa_convert.heal.resolved_settings import resolve
from sa_convert.models.load import load_tokenizer
from support.tiny_models import save_tiny, save_tokenizer

LENGTH = 64
WRITTEN = torch.arange(5, 5 + 20)[:, None].expand(-1, LENGTH)
"""20 rows that no text has: one token over and over."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "one"
    save_tiny("llama", folder)
    save_tokenizer(folder)
    return load_tokenizer(folder)


def found(tokenizer, text, written=None):
    return healing_text(tokenizer, 128, HealSettings(text=text, length=LENGTH), written)


def as_set(rows):
    return {tuple(row) for row in rows.tolist()}


def test_both_texts_train_and_judge(tokenizer):
    """Every row of the built-in text, and what the base wrote but for a fifth, which judges."""
    builtin, both = found(tokenizer, "builtin"), found(tokenizer, BOTH, WRITTEN)
    assert as_set(both.rows) == as_set(builtin.rows) | as_set(WRITTEN[4:])
    assert len(both.rows) == len(builtin.rows) + 16
    assert set(both.held_out.text) == {*builtin.held_out.text, "written"}
    assert as_set(both.held_out.text["written"]) == as_set(WRITTEN[:4])


def test_written_text_trains_alone_and_built_in_text_judges_too(tokenizer):
    builtin, written = found(tokenizer, "builtin"), found(tokenizer, "written", WRITTEN)
    assert as_set(written.rows) == as_set(WRITTEN[4:])
    assert set(written.held_out.text) == {*builtin.held_out.text, "written"}


@pytest.mark.parametrize("text", ["builtin", BOTH, "written"])
def test_nothing_is_trained_on_and_judged_by(tokenizer, text):
    told = found(tokenizer, text, None if text == "builtin" else WRITTEN)
    for rows in told.held_out.text.values():
        assert not as_set(rows) & as_set(told.rows)


@pytest.mark.parametrize(("calibration", "healing"), [("builtin", BOTH), ("hub:some/text", "hub:some/text")])
def test_text_is_the_calibrations_unless_it_is_named(calibration, healing):
    assert HealSettings().resolved(calibration, False, None).text == healing
    assert HealSettings(text="builtin").resolved(calibration, False, None).text == "builtin"


@pytest.mark.parametrize(
    ("told", "windows", "rate"),
    [
        ({}, False, 5e-4),
        ({}, True, 1e-4),
        ({"rate": 3e-3}, True, 3e-3),
        ({"train": "layers"}, True, 1e-4),
        ({"train": "lora"}, True, 1e-3),
    ],
)
def test_windows_heal_at_a_lower_rate(told, windows, rate):
    assert HealSettings(**told).resolved("builtin", windows, None).rate == rate


def test_a_step_has_a_row_for_each_process(monkeypatch):
    conversion = SimpleNamespace(
        plan=SimpleNamespace(treatments=()), model=SimpleNamespace(checkpoint=SimpleNamespace(config={}))
    )
    recipe = SimpleNamespace(calibration=SimpleNamespace(text="builtin"))
    assert resolve(HealSettings(), recipe, conversion).step_rows == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert resolve(HealSettings(), recipe, conversion).step_rows == 8
    assert resolve(HealSettings(rows=32), recipe, conversion).step_rows == 32
