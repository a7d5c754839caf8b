"""Layers without attention: every kind of family computes what its base does with the attention's output at zero."""

import pytest
import torch

from sa_convert.families.table import FAMILIES
from support.tiny_models import load_converted, save_tiny
from support.whole_layers import convert_layers, overruled

CASES = {
    "llama": [0, 3],
    "gemma2": [0, 1, 4],  # a norm after attention; the first sliding and the first full layer
    "gemma3_text": [0, 5],
    "olmo2": [0],
    "cohere": [1],  # attention and MLP side by side, from one norm
    "gpt_neox": [0, 2],
    "phi": [0],
    "gpt2": [0, 1],
    "opt": [0],
    "gptj": [0],
    "bloom": [0, 2],
    "falcon": [0],
    "gpt_oss": [0, 1],
    "qwen3_next": [1],  # the first layer that attends
    "jamba": [1],
}
STACKS = {  # by the layer's name, and its number in the model
    "bart": {"encoder.1": 1, "decoder.0": 6, "decoder.3": 9, "decoder.cross.0": 10},
    "t5": {"encoder.0": 0, "decoder.0": 6, "decoder.2": 8, "decoder.cross.0": 10, "decoder.cross.3": 13},
}


def generated(model, ids, **options):
    return model.generate(ids, max_new_tokens=10, do_sample=False, **options).tolist()


@pytest.mark.parametrize("model_type", CASES)
def test_it_computes_what_the_base_does_without_that_output(model_type, tmp_path):
    folder = convert_layers(tmp_path, model_type, dict.fromkeys(CASES[model_type], "drop"))
    base = save_tiny(model_type, tmp_path / "again")
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[1, :7] = 0
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not base._supports_sdpa:
            continue
        model = load_converted(folder, attn_implementation=implementation)
        with torch.no_grad(), overruled(base, model_type, dict.fromkeys(CASES[model_type])):
            for mask in (None, padded) if not FAMILIES[model_type].mixed else (None,):
                found, wanted = model(ids, attention_mask=mask), base(ids, attention_mask=mask, use_cache=False)
                real = slice(None) if mask is None else mask.bool()
                torch.testing.assert_close(found.logits[real], wanted.logits[real], atol=2e-5, rtol=1e-4)
            wanted = generated(base, ids, use_cache=False)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert generated(model, ids, **options) == wanted, options
        assert generated(model, ids, num_beams=3) == generated(model, ids, num_beams=3, use_cache=False)


@pytest.mark.parametrize("model_type", STACKS)
def test_encoders_decoders_and_cross_attention(model_type, tmp_path):
    layers = STACKS[model_type]
    folder = convert_layers(tmp_path, model_type, dict.fromkeys(layers, "drop"))
    base, model = save_tiny(model_type, tmp_path / "again"), load_converted(folder)
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad(), overruled(base, model_type, dict.fromkeys(layers.values())):
        wanted = base(ids, attention_mask=mask, decoder_input_ids=ids.flip(1), use_cache=False).logits
        tokens = generated(base, ids, use_cache=False)
    found = model(ids, attention_mask=mask, decoder_input_ids=ids.flip(1)).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert generated(model, ids, **options) == tokens, options
    assert generated(model, ids, num_beams=3) == generated(model, ids, num_beams=3, use_cache=False)
