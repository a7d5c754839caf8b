"""report.json and what the terminal shows."""

import json
import math
from dataclasses import replace

import pytest

from sa_convert.domain.change import CacheBytes
from sa_convert.domain.long_context import LongChange, LongContext, NeedleLosses, PositionLosses
from sa_convert.domain.losses import LossChange, Losses
from sa_convert.domain.report import (
    BaseModel,
    CopyingReport,
    DecodeCheck,
    GateResult,
)
from sa_convert.present.files.report_file import installed_versions, write_report
from sa_convert.present.terminal.report_text import render_report
from support.measured_report import MEASURED, UNMEASURED


def test_keys_of_the_contract():
    report = MEASURED.to_json()
    assert report["base_model"] == {"id": "org/base", "revision": "0123abc"}
    assert report["family"] == "llama"
    assert report["sharing"] == {
        "layers": {"27": [[26, 4], None], "28": [[22, 0], [22, 1]]},
        "reused_groups": 12,
        "total_groups": 90,
    }
    assert report["savings"] == {
        "parameters": {"before": 134_515_008, "after": 130_000_000},
        "checkpoint_bytes": {"before": 538_090_408, "after": 520_000_000},
        "cache_bytes_per_token": {"before": 46080, "after": 43008},
        "key_cache_removed": 0.133333,
    }
    assert report["perplexity"] == {
        "text": "builtin, validation part",
        "tokens": 8176,
        "before": 14.2948,
        "after": 15.0,
        "increase": pytest.approx(15 / 14.2948181 - 1, abs=1e-6),
        "dtype": "float32",
    }
    assert report["decode_check"] == {
        "max_abs_logit_difference": 8.9e-05,
        "same_greedy_tokens": True,
        "tolerance": 0.0013,
    }
    assert report["gate"] == {"max_perplexity_increase": 0.05, "passed": True}
    assert report["copying"] == {"loss": {"before": 1.7838, "after": 1.9821}, "period": 128, "tokens": 3072}


def test_without_validation_what_it_measures_is_null():
    report = UNMEASURED.to_json()
    assert [report[key] for key in ("perplexity", "decode_check", "gate", "copying")] == [None] * 4


def test_copying_loss_that_is_not_finite_is_null():
    report = replace(MEASURED, copying=CopyingReport(128, 3072, 1.5, float("inf"))).to_json()
    assert report["copying"]["loss"] == {"before": 1.5, "after": None}


def test_keys_of_long_context():
    lost = LossChange(Losses((2.0, 2.2)), Losses((2.1, 2.4)))
    contexts = [
        LongContext(2048, losses, (PositionLosses(1024, 2048, losses),), (NeedleLosses(0.1, losses),))
        for losses in (lost.before, lost.after)
    ]
    report = replace(
        MEASURED,
        long=LongChange(*contexts),
        cache=CacheBytes(200, 100, 4096, 2048, 7),
        copying=replace(MEASURED.copying, distances=((128, lost), (1024, lost))),
        savings=replace(MEASURED.savings, cache_over=4096),
        gate=GateResult(0.03, True, 0.1),
    ).to_json()
    nats = {"before": 2.1, "after": 2.25, "error": pytest.approx(0.05)}
    assert report["copying"]["128"] == report["copying"]["1024"] == nats
    assert report["copying"]["period"] == 128  # beside the distances
    assert report["needle"] == {"10%": nats}
    perplexity = {
        "before": pytest.approx(math.exp(2.1), rel=1e-5),
        "after": pytest.approx(math.exp(2.25), rel=1e-5),
        "increase": pytest.approx(math.exp(0.15) - 1, rel=1e-5),
        "error": pytest.approx(math.exp(0.15) * 0.05, rel=1e-4),
    }  # fmt: skip
    text = report["long_text"]
    assert text.pop("by_position") == [{"from": 1024, "to": 2048, **perplexity}]
    assert text == {"length": 2048, "sequences": 2, **perplexity}
    assert report["cache_bytes"] == {
        "at": 4096, "before": 200, "after": 100, "removed": 0.5, "measured_at": 2048, "room": 7
    }  # fmt: skip
    assert report["savings"]["cache_bytes_per_token"]["average_over"] == 4096
    assert report["gate"] == {"max_perplexity_increase": 0.03, "max_copying_increase": 0.1, "passed": True}
    assert [MEASURED.to_json()[key] for key in ("long_text", "needle", "cache_bytes")] == [None] * 3


def test_written_file_is_json_and_the_same_each_time(tmp_path):
    first = write_report(MEASURED, tmp_path).read_bytes()
    assert first == write_report(MEASURED, tmp_path).read_bytes()
    assert json.loads(first) == MEASURED.to_json()
    assert '"28": [[22, 0], [22, 1]]' in first.decode()
    assert '"27": [[26, 4], null],' in first.decode()


def test_base_model_is_never_a_path(tmp_path):
    (tmp_path / "org" / "model").mkdir(parents=True)
    local = BaseModel.of(str(tmp_path / "org" / "model"))
    assert (local.id, local.on_hub) == ("model", False)
    hub = BaseModel.of("org/model", "abc")
    assert (hub.id, hub.revision, hub.on_hub) == ("org/model", "abc", True)


def test_decode_check_fails_on_nan():
    assert not DecodeCheck(float("nan"), True, 1e-3).passed


def test_terminal_shows_every_number_in_aligned_rows():
    lines = render_report(MEASURED).splitlines()
    column = len("Cache per token") + 2
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    text = "\n".join(lines)
    for part in (
        "org/base at 0123abc (llama)",
        "12 of 90 KV groups borrow, in 2 layers",
        "134.5 M -> 130.0 M (-3.4%)",
        "538.1 MB -> 520.0 MB (-3.4%)",
        "46,080 bytes -> 43,008 bytes (-6.7%), measured",
        "13.3% removed",
        "14.295 -> 15.000 (+4.93%), 8,176 tokens in float32",
        "loss 1.78 -> 1.98 nats (+0.20), 3,072 tokens at distance 128",
        "passed: logits differ by at most 8.9e-05 (tolerance 0.0013), same greedy tokens",
        "passed: perplexity may rise by 5%",
    ):
        assert part in text


def test_terminal_says_what_was_not_measured():
    text = render_report(UNMEASURED)
    assert "not measured (--no-validate)" in text
    assert "computed from the map" in text
    assert "Perplexity" not in text


def test_versions_have_no_build_of_this_machine():
    versions = installed_versions()
    assert set(versions) == {"sa_convert", "torch", "transformers"}
    assert all("+" not in number for number in versions.values())
