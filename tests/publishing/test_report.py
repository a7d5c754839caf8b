"""report.json and what the terminal shows."""

import json
from dataclasses import replace

import pytest

from sa_convert.domain.report import (
    BaseModel,
    CopyingReport,
    DecodeCheck,
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
