"""Layers with a linear map in the place of attention: every kind of family computes what its base does with the
attention's output overruled by the map in the files."""

import pytest
import torch

from support.tiny_models import load_converted, save_tiny
from support.whole_layers import convert_layers, overruled

CASES = {"llama": [0, 3], "gemma2": [1], "cohere": [0], "gpt_neox": [0], "gpt2": [0, 1], "bloom": [2], "falcon": [1]}


def map_of(model, layer):
    """What the converted model's own files have for a layer: weight and bias of the one module in its attention."""
    names = [name for name in model.state_dict() if f".{layer}." in name and name.endswith("linear.weight")]
    (name,) = names
    weight, bias = model.state_dict()[name], model.state_dict()[name.replace("weight", "bias")]
    return lambda states: torch.einsum("oi,bti->bto", weight, states) + bias


@pytest.mark.parametrize("model_type", CASES)
def test_it_computes_what_the_base_does_with_the_map(model_type, tmp_path):
    layers = CASES[model_type]
    folder = convert_layers(tmp_path, model_type, dict.fromkeys(layers, "linear"))
    base = save_tiny(model_type, tmp_path / "again")
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not base._supports_sdpa:
            continue
        model = load_converted(folder, attn_implementation=implementation)
        with torch.no_grad(), overruled(base, model_type, {layer: map_of(model, layer) for layer in layers}):
            wanted = base(ids, use_cache=False).logits
            tokens = base.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
            torch.testing.assert_close(model(ids).logits, wanted, atol=2e-5, rtol=1e-4)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            found = model.generate(ids, max_new_tokens=10, do_sample=False, **options)
            assert torch.equal(found, tokens), options


def test_an_encoder_and_a_decoder(tmp_path):
    folder = convert_layers(tmp_path, "bart", {"encoder.2": "linear", "decoder.0": "linear"})
    base, model = save_tiny("bart", tmp_path / "again"), load_converted(folder)
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    parts = {2: "encoder.layers.2", 6: "decoder.layers.0"}
    maps = {}
    for number, part in parts.items():
        module = model.get_submodule(f"model.{part}.self_attn.linear")
        maps[number] = module.forward
    with torch.no_grad(), overruled(base, "bart", maps):
        wanted = base(ids, decoder_input_ids=ids.flip(1), use_cache=False).logits
        tokens = base.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
        torch.testing.assert_close(model(ids, decoder_input_ids=ids.flip(1)).logits, wanted, atol=2e-5, rtol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), tokens)
