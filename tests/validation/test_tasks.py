"""Masked and sequence-to-sequence language models: what is scored, against models run by hand, and what is refused."""

import json
import re

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import AutoTokenizer, T5ForConditionalGeneration

from sa_convert.domain.change import Change, Savings
from sa_convert.domain.report import BaseModel, PerplexityReport, Report
from sa_convert.errors import CheckpointError, DataError, SaConvertError
from sa_convert.jobs.evaluating import EvaluateOptions, evaluate
from sa_convert.measure.quality.cache_bytes import cache_bytes_per_token
from sa_convert.measure.quality.decode import decode_check
from sa_convert.measure.quality.perplexity import perplexity
from sa_convert.models.arguments import cache_keyword
from sa_convert.models.auto_class import auto_class_name, prediction_task
from sa_convert.models.denoising import SecondHalf, Sentinels
from sa_convert.models.placement import positions
from sa_convert.models.task import NEXT_TOKEN, frame_of, task_of
from sa_convert.observe.sequences import Sample, calibration_set
from sa_convert.present.files.card import write_card
from sa_convert.present.terminal.report_text import render_report
from sa_convert.read.folder import read_config
from sa_convert.texts.text import load_text
from sa_convert.treatments.share.drawing import told
from sa_convert.treatments.share.sharing_map import SharingMap
from support.cli_cases import refused
from support.processes import run_cli
from support.task_models import SIZES, opened, save
from support.tiny_models import write_recipe
from support.validation_models import tokenizer as byte_tokenizer

SMALL = ["--sequences", 2, "--length", 64, "--device", "cpu"]
OPTIONS = EvaluateOptions(sequences=2, length=64, device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {kind: save(home / kind, kind) for kind in SIZES}


def losses_by_hand(model, inputs: dict, labels: list[int], places: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(**{name: torch.tensor([row]) for name, row in inputs.items()}).logits[0]
    return [float(functional.cross_entropy(logits[at], torch.tensor(labels[at]))) for at in places]


def test_masked_loss_equals_a_loop(folders):
    model, words, task, tokens = opened(folders["bert"])
    assert task.name == "masked-token"
    found = []
    for row, chosen in zip(tokens.tolist(), task.scored(tokens).tolist(), strict=True):
        assert (row[0], row[-1]) == (words.cls_token_id, words.eos_token_id)
        places = [at for at, picked in enumerate(chosen) if picked]
        assert len(places) == round(0.15 * 58)
        assert not {row[at] for at in places} & set(words.all_special_ids)
        shown = [words.mask_token_id if at in places else token for at, token in enumerate(row)]
        found += losses_by_hand(model, {"input_ids": shown}, row, places)
    for batch in (1, 2):
        measured = perplexity(model, tokens, task=task, batch=batch)
        assert measured.tokens == len(found) == 3 * 9
        assert measured.loss == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_loss_of_a_model_with_several_pretraining_heads(folders, tmp_path):
    model, _, task, tokens = opened(save(tmp_path / "both", "bert", "BertForPreTraining"))
    masked = transformers.BertForMaskedLM.from_pretrained(tmp_path / "both").eval()
    assert perplexity(model, tokens, task=task).loss == pytest.approx(perplexity(masked, tokens, task=task).loss)


def test_sentinel_loss_equals_a_loop_and_texts_are_rebuilt(folders):
    model, words, task, tokens = opened(folders["t5"])
    assert isinstance(task, Sentinels)
    sentinels = words.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(20)])
    inputs = task.batch(model, tokens)
    found = []
    for at, row in enumerate(tokens.tolist()):
        source, target = inputs.kwargs["input_ids"][at].tolist(), inputs.labels[at].tolist()
        # The spans, by the sentinels before them.
        spans, now = {}, None
        for token in target[:-1]:
            if token in sentinels:
                spans[now := token] = []
            else:
                spans[now].append(token)
        assert list(spans) == sentinels[: len(spans)]
        last = spans.pop(sentinels[len(spans) - 1])
        assert not last
        assert all(spans.values())
        assert target[-1] == source[-1] == words.eos_token_id
        assert [token for part in source for token in spans.get(part, [part])] == row
        assert sum(map(len, spans.values())) == round(0.15 * 59)
        assert len(spans) == 3
        scored = [place for place, token in enumerate(target[:-1]) if token not in sentinels]
        assert inputs.scored[at].nonzero()[:, 0].tolist() == scored
        read = {"input_ids": source, "decoder_input_ids": [model.config.decoder_start_token_id, *target[:-1]]}
        assert inputs.kwargs["decoder_input_ids"][at].tolist() == read["decoder_input_ids"]
        found += losses_by_hand(model, read, target, scored)
    measured = perplexity(model, tokens, task=task, batch=2)
    assert measured.tokens == len(found)
    assert measured.loss == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_what_a_decoder_starts_with_must_be_known(folders):
    model, _, task, tokens = opened(folders["t5"])
    expected = task.batch(model, tokens).kwargs["decoder_input_ids"]
    del model.config.decoder_start_token_id
    model.generation_config.decoder_start_token_id = 0
    assert task.batch(model, tokens).kwargs["decoder_input_ids"].equal(expected)
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(CheckpointError, match="no 'decoder_start_token_id'"):
        task.batch(model, tokens)


def test_infilling_loss_equals_a_loop(folders):
    model, words, task, tokens = opened(folders["bart"])
    scored = task.scored(tokens)
    inputs = task.batch(model, tokens)
    found = []
    for at, (row, chosen) in enumerate(zip(tokens.tolist(), scored.tolist(), strict=True)):
        shown = []
        for token, picked in zip(row, chosen, strict=True):
            if not picked:
                shown.append(token)
            elif shown[-1] != words.mask_token_id:
                shown.append(words.mask_token_id)
        assert inputs.kwargs["input_ids"][at].tolist() == shown
        read = {"input_ids": shown, "decoder_input_ids": [3, *row[:-1]]}
        places = [place for place, picked in enumerate(chosen) if picked]
        assert len(places) == round(0.15 * 58)
        found += losses_by_hand(model, read, row, places)
    measured = perplexity(model, tokens, task=task, batch=3)
    assert measured.tokens == len(found)
    assert measured.loss == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_without_sentinels_or_mask_the_second_half_is_predicted(folders):
    model, words, _, tokens = opened(folders["bart"])
    words.mask_token = None
    task = task_of(read_config(folders["bart"]), words, "model")
    assert isinstance(task, SecondHalf)
    found = []
    for row in tokens.tolist():
        source, target = [*row[:30], words.eos_token_id], row[30:]
        read = {"input_ids": source, "decoder_input_ids": [3, *target[:-1]]}
        found += losses_by_hand(model, read, target, list(range(len(target) - 1)))
    measured = perplexity(model, tokens, task=task, batch=3)
    assert measured.tokens == len(found) == 3 * 29
    assert measured.loss == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_next_token_counts_what_is_scored(folders):
    model, _, task, tokens = opened(folders["llama"])
    assert task is NEXT_TOKEN
    late = torch.zeros(3, 60, dtype=torch.bool)
    late[:, 40:] = True
    inputs = task.batch(model, tokens, late)
    for row, (predictions, labels) in zip(tokens, inputs.scored_logits(inputs.logits(model)), strict=True):
        assert labels.tolist() == row[40:].tolist()
        with torch.no_grad():
            assert torch.allclose(predictions, model(row[None]).logits[0, 39:-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "t5", "bart"])
def test_what_is_scored_depends_on_the_sequence_and_the_seed_alone(folders, kind):
    _, words, task, tokens = opened(folders[kind])
    scored = task.scored(tokens)
    assert task.scored(tokens.flip(0)).equal(scored.flip(0))
    again = task_of(read_config(folders[kind]), AutoTokenizer.from_pretrained(folders[kind]), "again")
    assert again == task
    assert again.scored(tokens).equal(scored)
    assert not scored[0].equal(scored[1])
    other = task_of(read_config(folders[kind]), words, "other", seed=1)
    assert not other.scored(tokens).equal(scored)


def test_spans_are_random_and_never_touch(folders):
    _, _, task, _ = opened(folders["t5"])
    rows = torch.randint(4, 200, (200, 59), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, torch.ones(200, 1, dtype=torch.long)], dim=1)
    scored = task.scored(rows)
    assert (scored.sum(1) == 9).all()
    assert ((scored[:, 1:] & ~scored[:, :-1]).sum(1) == 3).all()
    assert not scored[:, 0].any()
    assert not scored[:, -2:].any()
    assert scored[:, 1:-2].any(0).all()
    with pytest.raises(DataError, match="too short"):
        task.scored(rows[:, -3:])


def test_frame_is_what_the_tokenizer_puts_around_a_text(folders):
    frames = {kind: frame_of(AutoTokenizer.from_pretrained(folder)) for kind, folder in folders.items()}
    begin, end = byte_tokenizer().convert_tokens_to_ids(["<s>", "</s>"])
    assert frames["bert"] == ((begin,), (end,))
    assert frames["t5"] == ((), (end,))
    assert frame_of(byte_tokenizer()) == ((), ())


def test_calibration_without_repetition_for_masked_models(folders):
    model, words, task, _ = opened(folders["bert"])
    made = calibration_set(words, len(words), load_text("builtin"), 10, 48, task=task)
    samples = (*made.fit, *made.held_out)
    assert len(samples) == 10
    for sample in samples:
        assert not sample.repetition
        assert sample.tokens_scored == int(sample.scored.sum()) == round(0.15 * 46)
        shown = sample.inputs(model).kwargs["input_ids"][0]
        assert (shown == words.mask_token_id).equal(sample.scored)
        assert sample.tokens[0] == words.cls_token_id
    assert Sample(torch.arange(9), "text", torch.ones(9, dtype=torch.bool)).tokens_scored == 8


class Forgets(T5ForConditionalGeneration):
    """Drops the newest cached token: right in one pass, wrong with a cache."""

    def forward(self, input_ids=None, **kwargs):
        cache = kwargs.get(cache_keyword(super()))
        if cache is not None and cache.get_seq_length() > 1:
            cache.self_attention_cache.crop(-1)
        return super().forward(input_ids, **kwargs)


class RereadsAnother(T5ForConditionalGeneration):
    """generate() with a cache goes astray; the logits are right."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("use_cache") and inputs["decoder_input_ids"].shape[1] == 1:
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"] * 0 + 5
        return inputs


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_decode_check_of_encoder_decoders(folders, kind):
    model, _, task, tokens = opened(folders[kind])
    decoding = task.decoding(model, tokens[0])
    check = decode_check(model, decoding.tokens, 0.0, decoding.source)
    assert check.passed
    assert check.max_abs_logit_difference > 0


def test_decode_check_catches_a_broken_cache_of_an_encoder_decoder(folders):
    good, _, task, tokens = opened(folders["t5"])
    decoding = task.decoding(good, tokens[0])
    broken = Forgets.from_pretrained(folders["t5"]).eval()
    assert perplexity(broken, tokens, task=task) == perplexity(good, tokens, task=task)
    check = decode_check(broken, decoding.tokens, 0.0, decoding.source)
    assert check.max_abs_logit_difference > check.tolerance
    astray = decode_check(RereadsAnother.from_pretrained(folders["t5"]).eval(), decoding.tokens, 0.0, decoding.source)
    assert astray.max_abs_logit_difference <= astray.tolerance
    assert not astray.same_greedy_tokens


def test_cache_of_an_encoder_decoder_counts_both_sides(folders):
    model, _, task, tokens = opened(folders["t5"])
    decoding = task.decoding(model, tokens[0])
    # 2 layers of 4 heads of 8 elements, keys and values, own and cross-attention.
    full = 2 * 4 * 8 * 2 * 2
    assert cache_bytes_per_token(model, decoding.tokens[:5], None, decoding.source) == full * 4
    assert cache_bytes_per_token(model, decoding.tokens[:5], torch.float16, decoding.source) == full * 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "AutoModelForCausalLM"),
        ({"model_type": "llama"}, "AutoModelForCausalLM"),
        ({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, "AutoModelForCausalLM"),
        ({"model_type": "none", "architectures": ["NoneForMaskedLM"]}, "AutoModelForMaskedLM"),
        ({"model_type": "none", "is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
        (
            {"model_type": "none", "architectures": ["NoneForConditionalGeneration"], "text_config": {}},
            "AutoModelForImageTextToText",
        ),
        (
            {"model_type": "none", "architectures": ["NoneForConditionalGeneration"], "is_encoder_decoder": True},
            "AutoModelForSeq2SeqLM",
        ),
        (
            {
                "model_type": "own",
                "architectures": ["Own"],
                "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.Bare", "AutoModelForMaskedLM": "code.Own"},
            },
            "AutoModelForMaskedLM",
        ),
        (
            {
                "model_type": "shared_attention_bert",
                "architectures": ["Other"],
                "auto_map": {"AutoConfig": "code.C", "AutoModelForMaskedLM": "code.Model"},
            },
            "AutoModelForMaskedLM",
        ),
    ],
)
def test_auto_class_by_config(config, expected):
    assert auto_class_name(config) == expected


def test_evaluate_a_masked_model_as_a_process(folders, tmp_path):
    other = save(tmp_path / "other", "bert", hidden_act="relu")
    result = run_cli("evaluate", other, "--against", folders["bert"], *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["task"], found["probes"]) == ("masked-token", None)
    assert found["text"]["tokens"] == found["agreement"]["tokens"] == 2 * round(0.15 * 62)
    for key in ("model", "against"):
        assert (found[key]["decode_check"], found[key]["copying"]) == (None, None)
        assert found[key]["perplexity"] > 1
    assert found["model"]["loss"] != found["against"]["loss"]
    assert found["agreement"]["kl"] > 0


def test_evaluate_an_encoder_decoder_in_a_terminal(folders):
    result = run_cli("evaluate", folders["t5"], *SMALL)
    assert result.returncode == 0, result.stderr
    assert "Perplexity (teacher-forced)" in result.stdout
    assert re.search(r"Cached decoding +passed", result.stdout)
    assert "Copying: not probed, since" in result.stdout
    assert "Copying loss" not in result.stdout


@pytest.mark.parametrize("kind", ["bert", "t5", "bart"])
def test_a_model_agrees_with_itself(folders, kind):
    found = evaluate(str(folders[kind]), str(folders[kind]), load_text("builtin"), OPTIONS)
    assert (found.agreement.kl, found.agreement.top1) == (0, 1)
    assert found.agreement.tokens == found.tokens > 0
    assert found.model == found.against


def test_models_that_predict_in_different_ways_are_not_compared(folders):
    with pytest.raises(CheckpointError, match="bert does masked-token prediction and llama next-token prediction"):
        evaluate(str(folders["bert"]), str(folders["llama"]), load_text("builtin"), OPTIONS)


def test_without_a_language_modelling_head(tmp_path):
    folder = save(tmp_path / "classifier", "llama", "LlamaForSequenceClassification", pad_token_id=0)
    result = run_cli("evaluate", folder, *SMALL)
    refused(result, 1, r"LlamaForSequenceClassification has no language-modelling head.*--no-validate")
    with pytest.raises(DataError, match="x: BertModel has no language-modelling head"):
        prediction_task({"model_type": "bert", "architectures": ["BertModel"]}, "x")


def test_without_a_mask_token(folders, tmp_path):
    words = AutoTokenizer.from_pretrained(folders["bert"])
    words.mask_token = None
    with pytest.raises(DataError, match=r"bert: the tokenizer has no mask token.*tokenizer_config\.json"):
        task_of(read_config(folders["bert"]), words, "bert")


def test_positions_counted_from_behind_the_padding_token(folders):
    assert positions(read_config(folders["roberta"])) == 64
    found = evaluate(str(folders["roberta"]), None, load_text("builtin"), EvaluateOptions(sequences=1, device="cpu"))
    assert found.length == 64
    with pytest.raises(SaConvertError, match="--length 66 is more than the 64 positions"):
        evaluate(
            str(folders["roberta"]), None, load_text("builtin"), EvaluateOptions(sequences=1, length=66, device="cpu")
        )
    long = evaluate(
        str(folders["bert"]), None, load_text("builtin"), EvaluateOptions(sequences=1, length=96, device="cpu")
    )
    assert long.length == 96


def report_of(task: str, cached: int, auto_class: str) -> Report:
    savings = Savings(Change(100, 90), Change(400, 360), Change(cached, cached // 2), 0.25)
    measured = PerplexityReport("text", 10, 5.0, 5.5, "float32", task)
    return Report(
        BaseModel("org/base"),
        "bert",
        (told(SharingMap({}), 1, 4, cached > 0),),
        savings,
        measured,
        auto_class=auto_class,
    )


def test_reports_say_what_was_measured(tmp_path):
    report = report_of("masked-token", 0, "AutoModelForMaskedLM")
    assert report.to_json()["perplexity"]["task"] == "masked-token"
    assert report.to_json()["decode_check"] is None
    shown = render_report(report)
    assert "Perplexity (masked-token)" in shown
    assert "the model caches nothing" in shown
    assert "-0.0%" not in shown
    card = write_card(report, "sharing: {}", tmp_path).read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM.from_pretrained" in card
    assert "Perplexity (masked-token) on 10 tokens" in card
    assert "cache no keys" not in card
    plain = report_of("next-token", 8, "AutoModelForCausalLM")
    assert "task" not in plain.to_json()["perplexity"]
    assert "pipeline_tag: text-generation" in write_card(plain, "sharing: {}", tmp_path).read_text()


def test_converting_a_model_without_a_language_modelling_head(tmp_path):
    folder = save(tmp_path / "classifier", "bert", "BertForSequenceClassification")
    recipe = write_recipe(tmp_path / "map.json", {1: [[0, 1], [0, 0], None, None]})
    out = tmp_path / "out"
    result = run_cli("convert", folder, "--recipe", recipe, "-o", out)
    refused(result, 1, r"BertForSequenceClassification has no language-modelling head.*--no-validate", out)
    done = run_cli("convert", folder, "--recipe", recipe, "-o", out, "--no-validate")
    assert done.returncode == 0, done.stderr
    assert "AutoModelForSequenceClassification.from_pretrained" in (out / "README.md").read_text()
    assert json.loads((out / "report.json").read_text())["perplexity"] is None


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_conversion_is_validated_and_evaluated(folders, tmp_path, kind):
    rows = {"1": [[0, 1], [0, 0], None, None]}
    if kind == "t5":
        rows = {f"{stack}.1": [[0, head] for head in range(4)] for stack in ("encoder", "decoder.cross")}
    recipe, out = tmp_path / "map.json", tmp_path / "out"
    recipe.write_text(json.dumps({"sharing": {"map": rows}, "gate": {"max_perplexity_increase": "100%"}}))
    result = run_cli("convert", folders[kind], "--recipe", recipe, "-o", out)
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["copying"] is None
    cache = report["savings"]["cache_bytes_per_token"]
    if kind == "bert":
        assert report["perplexity"]["task"] == "masked-token"
        assert report["decode_check"] is None
        assert cache == {"before": 0, "after": 0}
    else:
        assert report["perplexity"]["task"] == "teacher-forced"
        assert report["decode_check"]["same_greedy_tokens"] is True
        # 8 keys and values of 4 heads, 4 bytes each: one of four layers' keys are gone.
        assert cache == {"before": 4 * 2 * 128, "after": 4 * 2 * 128 - 128}
    found = evaluate(str(out), str(folders[kind]), load_text("builtin"), OPTIONS)
    assert found.agreement.kl > 0
    assert found.task == report["perplexity"]["task"]
