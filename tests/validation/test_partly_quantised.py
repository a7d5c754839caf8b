"""Bases whose feed-forward parts alone are quantised: what they round is not held against the conversion."""

import json
import shutil

import pytest
import torch

from support.cli_cases import refused
from support.processes import run_cli
from support.tiny_models import write_recipe
from support.validation_models import save_base

pytest.importorskip("bitsandbytes")

HEADS = {3: [[2, 0], [2, 1], None, None], 4: [[2, 3], [2, 2], [2, 1], [2, 0]]}
KINDS = {
    "8 bits": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("plain") / "m", hidden_size=128, intermediate_size=256, head_dim=32)


def quantised(plain, folder, kind, attention=False):
    """The model with feed-forward parts of few bits, and attention, too, if asked for."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    skipped = ["lm_head"] if attention else ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    config = BitsAndBytesConfig(**KINDS[kind], llm_int8_skip_modules=skipped)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / name, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_convert_and_evaluate(plain, tmp_path, kind):
    folder = quantised(plain, tmp_path / "base", kind)
    recipe = write_recipe(tmp_path / "map.json", HEADS, gate={"max_perplexity_increase": "100%"})
    result = run_cli("convert", folder, "--recipe", recipe, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    check = json.loads((tmp_path / "out" / "report.json").read_text())["decode_check"]
    assert 1e-3 < check["max_abs_logit_difference"] <= check["tolerance"]
    for model in (folder, tmp_path / "out"):
        result = run_cli("evaluate", model, "--sequences", 2, "--length", 64, "--json")
        assert result.returncode == 0, result.stderr
        check = json.loads(result.stdout)["model"]["decode_check"]
        assert check["max_abs_logit_difference"] <= check["tolerance"]
        assert check["same_greedy_tokens"]


def test_a_broken_cache_is_still_found(plain, tmp_path, monkeypatch):
    """The tolerance is that of the base, so a fault of the size of a logit does not pass."""
    from transformers import AutoModelForCausalLM

    from sa_convert.measure.quality.decode import decode_check, rounding_difference
    from sa_convert.models.steps import Steps

    model = AutoModelForCausalLM.from_pretrained(quantised(plain, tmp_path / "base", "8 bits")).eval()
    sequence = torch.randint(3, 300, (128,), generator=torch.Generator().manual_seed(0))
    rounding = rounding_difference(model, sequence)
    assert rounding > 1e-3
    assert decode_check(model, sequence, rounding).passed
    following = Steps.next

    def forgetful(self, output, place, *count):
        for layer in output.past_key_values.layers:
            layer.values = layer.values.flip(2)
        return following(self, output, place, *count)

    monkeypatch.setattr(Steps, "next", forgetful)
    assert not decode_check(model, sequence, rounding).passed


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_attention_is_refused(plain, tmp_path, kind):
    folder = quantised(plain, tmp_path / "base", kind, attention=True)
    result = run_cli("convert", folder, "--recipe", "late-span", "-o", tmp_path / "out")
    refused(result, 1, "attention's projections are quantised by bitsandbytes", tmp_path / "out")
