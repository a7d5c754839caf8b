"""Validation also runs once in the dtype of the files, in which users load them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_convert.errors import GateRefused
from sa_convert.measure.quality.gate import KINDS, validate
from sa_convert.measure.quality.perplexity import Perplexity
from sa_convert.measure.quality.stored_dtype import compared
from sa_convert.models.load import load_tokenizer
from sa_convert.models.placement import place
from sa_convert.models.task import task_of
from sa_convert.models.tokens import token_sequences
from sa_convert.read.folder import read_config
from sa_convert.texts.text import load_text
from support.validation_models import save_base, save_converted

OPTIONS = {"sequences": 4, "length": 64}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def pair(request, tmp_path):
    base = save_base(tmp_path / "base", dtype=request.param)
    return base, save_converted(base, tmp_path / "converted"), str(request.param).removeprefix("torch.")


def independent(folder, dtype, tokens):
    """Perplexity by the loss of transformers, of the model as a user loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=True).eval()
    with torch.no_grad():
        return torch.stack([model(row[None], labels=row[None]).loss.float() for row in tokens]).mean().exp().item()


def test_both_models_are_measured_as_they_are_stored(pair):
    base, converted, dtype = pair

    found = validate(base, converted, load_text("builtin"), None, **OPTIONS).perplexity
    assert found.dtype == "float32"
    assert found.stored.dtype == dtype
    tokenizer = load_tokenizer(base)
    frame = task_of(read_config(base), tokenizer, "it").frame
    tokens = token_sequences(tokenizer, load_text("builtin").split("validation", KINDS), 4, 64, frame)[:2]
    assert found.stored.tokens == 2 * 63
    assert found.stored.before == pytest.approx(independent(base, dtype, tokens), rel=2e-3)
    assert found.stored.after == pytest.approx(independent(converted, dtype, tokens), rel=2e-3)
    assert found.stored.exact_before == pytest.approx(independent(base, "float32", tokens), rel=1e-4)
    assert abs(found.stored.rounding) < 0.01


def test_float32_models_are_measured_once(tmp_path):
    base = save_base(tmp_path / "base")
    converted = save_converted(base, tmp_path / "converted")
    assert validate(base, converted, load_text("builtin"), None, **OPTIONS).perplexity.stored is None


def test_overflow_of_the_converted_model_alone_is_refused(tmp_path):
    """In float32 both are fine. In float16 values of a layer that borrows overflow, as scores once did."""
    base = save_base(tmp_path / "base", dtype=torch.float16)
    converted = save_converted(base, tmp_path / "converted")
    file = converted / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "layers.2.self_attn.v_proj" in name:
            tensors[name] = tensors[name] * 0 + 6e4
        if "layers.2.self_attn.o_proj" in name:
            tensors[name] = tensors[name] * 1e-4
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(GateRefused, match="not finite in float16, the dtype of its files, though the base model's is"):
        validate(base, converted, load_text("builtin"), None, **OPTIONS)


def test_loss_by_rounding_is_refused(tmp_path):
    placement = replace(place(save_base(tmp_path / "base", dtype=torch.bfloat16), "cpu"), dtype=torch.float32)
    exact = Perplexity(2.0, 100), Perplexity(2.1, 100)
    kept = compared(placement, exact, (Perplexity(2.02, 100), Perplexity(2.125, 100)))
    assert kept.rounding == pytest.approx(0.00501, abs=1e-4)
    with pytest.raises(GateRefused, match=r"loses 2\.0% of perplexity more by rounding than its base"):
        compared(placement, exact, (Perplexity(2.02, 100), Perplexity(2.14, 100)))
    # Nothing can be said where the base itself overflows.
    assert compared(placement, exact, (Perplexity(float("nan"), 100), Perplexity(float("nan"), 100))) is None
