"""Layers with fewer KV groups: every kind of family computes what its base does with projected keys and values."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sa_convert.families.table import FAMILIES
from sa_convert.read.geometry_of import merging_problem
from sa_convert.treatments.low_rank.runtime import Turner
from sa_convert.treatments.merge.rules import refusal
from support.merged_models import merged_base
from support.tiny_models import attentions_of, geometry_of_folder, load_converted, save_tiny
from support.whole_layers import convert_layers

TWO = "{merge: {groups: 2}}"
CASES = {
    "llama": {0: "merge", 3: TWO},  # with biases
    "mistral": {1: "merge"},
    "qwen2": {2: TWO, 3: "merge"},
    "gemma2": {0: "merge", 1: "merge"},  # scores are capped; a window
    "gpt_oss": {0: "merge", 1: TWO},  # attention sinks
    "granite": {1: "merge"},
    "mixtral": {1: "merge"},
}


def numbers(layers):
    return {layer: 2 if told == TWO else 1 for layer, told in layers.items()}


@pytest.mark.parametrize("model_type", CASES)
def test_it_computes_what_the_base_does_with_projected_keys_and_values(model_type, tmp_path):
    layers = CASES[model_type]
    folder = convert_layers(tmp_path, model_type, layers)
    base = save_tiny(model_type, tmp_path / "again")
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[1, :7] = 0
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not base._supports_sdpa:
            continue
        model = load_converted(folder, attn_implementation=implementation)
        plain = base(ids, use_cache=False).logits
        with torch.no_grad(), merged_base(base, model_type, tmp_path / "base", numbers(layers)):
            for mask in (None, padded):
                found, wanted = model(ids, attention_mask=mask), base(ids, attention_mask=mask, use_cache=False)
                real = slice(None) if mask is None else mask.bool()
                torch.testing.assert_close(found.logits[real], wanted.logits[real], atol=5e-5, rtol=1e-3)
            assert (wanted.logits - plain)[0].abs().max() > 1e-3
            tokens = base.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False).tolist()
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert model.generate(ids, max_new_tokens=10, do_sample=False, **options).tolist() == tokens, options
        beams = [model.generate(ids, max_new_tokens=10, num_beams=3, use_cache=use).tolist() for use in (True, False)]
        assert beams[0] == beams[1]


def test_the_files_have_fewer_keys_and_values(tmp_path):
    folder = convert_layers(tmp_path, "llama", {0: "merge", 3: TWO})
    state = load_converted(folder).state_dict()
    for layer, left in {0: 1, 1: 4, 3: 2}.items():
        for side, heads in {"q": 8, "k": left, "v": left}.items():
            assert state[f"model.layers.{layer}.self_attn.{side}_proj.weight"].shape == (16 * heads, 64)
            assert state[f"model.layers.{layer}.self_attn.{side}_proj.bias"].shape == (16 * heads,)


REFUSED = {
    **dict.fromkeys(("ernie4_5", "helium", "glm", "cohere2"), "lie side by side"),
    **dict.fromkeys(("qwen3", "gemma3_text", "olmo2", "stablelm"), "normalised after their projections"),
    **dict.fromkeys(("phi3", "falcon", "gpt_neox"), "come from one projection"),
    **dict.fromkeys(("gpt2", "opt", "jamba", "bloom"), "keys do not turn by position; low_rank"),
    **{"bamba": "only a part of each key turns", "bitnet": "normalised before it is projected"},
    **{"qwen2_moe": "as many keys as config.json says", "olmo": "its values are clipped"},
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_merged_is_refused_with_the_reason(model_type, tmp_path):
    save_tiny(model_type, tmp_path / "base")
    geometry = geometry_of_folder(tmp_path / "base")
    layers = [index for index, layer in enumerate(geometry.layers) if layer.heads]
    assert REFUSED[model_type] in refusal(geometry, layers[0])


MAY = sorted(
    name
    for name, family in FAMILIES.items()
    if merging_problem({}, family) is None and family.modules.rotary != "none" and not family.modules.bidirectional
)


@pytest.mark.parametrize("model_type", MAY)
def test_wherever_it_may_be_done_two_numbers_half_a_head_apart_turn_together(model_type, tmp_path):
    """By the family's own function: to multiply pairs with i, which a quarter of a turn does, and to turn commute."""
    base = save_tiny(model_type, tmp_path / "base")
    geometry = geometry_of_folder(tmp_path / "base")
    found, given = list(attentions_of(base, FAMILIES[model_type])), {}
    for number, attention in enumerate(found):

        def note(module, args, kwargs, at=number):
            pairs = (each for each in (*args, *kwargs.values()) if isinstance(each, tuple) and len(each) >= 2)
            given[at] = next((pair[:2] for pair in pairs if all(map(torch.is_tensor, pair[:2]))), None)

        if attention is not None:
            attention.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        base(torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(0)))

    def quarter(states):
        first, second = states.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

    seen = 0
    for number, layer in enumerate(geometry.layers):
        if not layer.heads or not layer.rotary:
            continue
        module, names = sys.modules[type(found[number]).__module__], SimpleNamespace(rotary="all")
        turner = Turner(module, names, found[number], 0, None, layer.head_dim)
        keys = torch.randn(1, 2, 9, layer.head_dim, generator=torch.Generator().manual_seed(1))
        turned = turner.turn(keys, given[number])
        assert ((turned - keys)[0, :, -1].abs().amax(0) > 1e-7).all(), "a part does not turn"
        torch.testing.assert_close(turner.turn(quarter(keys), given[number]), quarter(turned), atol=1e-5, rtol=1e-5)
        seen += 1
    assert seen
