"""Low-rank values, and keys that are not turned by position: every kind of family computes what its base does with
projected ones, and its files are as narrow as its cache."""

import pytest
import torch
from transformers import DynamicCache

from sa_convert.errors import PlanError
from sa_convert.treatments.low_rank.rules import is_folded
from support.low_rank_models import convert, projected, projected_logits, tensors_of
from support.tiny_models import load_converted, with_cache

VALUES = {1: {0: 5, 1: 4}, 2: {0: 6, 1: 6, 2: 6, 3: 6}, 4: {3: 6}}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
# Biases; norms of keys; fused projections of both orders, and one that holds (input, output); sinks, windows, ALiBi;
# one KV group; keys that are turned in the family's own code; layers without attention.
FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "olmo2", "gpt_oss", "phi3", "gpt_neox", "gptj", "falcon", "bloom"),
    *("gpt2", "opt", "stablelm", "nemotron", "lfm2", "llama4_text"),
)


def ids_of(length: int = 20) -> torch.Tensor:
    return torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(0))


def agree(found, generates=True, **inputs):
    """The converted model computes and writes what the base does with projected keys and values."""
    ids = ids_of()
    wanted = projected_logits(found, ids, **inputs)
    if generates:
        with torch.no_grad(), projected(found):
            tokens = found.base.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    with torch.no_grad():
        assert (found.base(ids, use_cache=False, **inputs).logits - wanted).abs().max() > 1e-3
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not found.base._supports_sdpa:
            continue
        model = load_converted(found.folder, attn_implementation=implementation)
        for cached in (False, True):
            with torch.no_grad():
                torch.testing.assert_close(model(ids, use_cache=cached, **inputs).logits, wanted, **CLOSE)
        for options in ({}, {"cache_implementation": "static"}) if generates else ():
            made = model.generate(ids, max_new_tokens=8, do_sample=False, **options)
            assert torch.equal(made, tokens), (implementation, options)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_values(family, tmp_path):
    groups = {"falcon": {1: {0: 5}}, "lfm2": {1: {0: 5, 1: 4}, 2: dict.fromkeys(range(4), 6)}}
    agree(convert(tmp_path, family, {}, values=groups.get(family, VALUES)))


# The layer, keys and values, and what the family is told besides.
UNTURNED = {
    "gpt2": ({1: {0: 5, 3: 7}, 2: {1: 4}}, {1: {0: 6}, 2: dict.fromkeys(range(8), 3)}, {}),
    "opt": ({1: {0: 5, 3: 7}, 2: dict.fromkeys(range(8), 4)}, {2: dict.fromkeys(range(8), 4)}, {}),
    "bloom": ({1: {0: 5, 3: 7}}, {1: {0: 6}, 2: {1: 4}}, {}),
    "falcon": ({1: {0: 5, 3: 7}}, {2: {1: 4}}, {"alibi": True, "multi_query": False}),
    "smollm3": ({2: {0: 6}, 3: {0: 5, 2: 7}}, {3: {0: 4, 1: 6}}, {}),
    "cohere2": ({0: {1: 6}, 3: {0: 5, 2: 7}}, {3: dict.fromkeys(range(4), 5)}, {}),
    "llama4_text": ({1: {0: 5, 2: 7}}, {1: {0: 4, 1: 6}}, {}),
    "exaone4": ({1: {0: 5, 2: 7}}, {1: {0: 4, 1: 6}}, {}),  # its norms of keys leave their projection whole
    "jamba": ({1: {0: 5, 2: 7}}, {}, {}),
}


@pytest.mark.parametrize("family", UNTURNED)
def test_keys_that_are_not_turned(family, tmp_path):
    ranks, values, changes = UNTURNED[family]
    found = convert(tmp_path, family, ranks, values=values, **changes)
    layers = [layer for layer in ranks if not found.model.geometry.layers[layer].rotary]
    assert layers
    agree(found, generates=family != "falcon")  # whose base does not with ALiBi
    bases = [name for name in tensors_of(found.folder) if ".low_rank." in name]
    folded = [is_folded(found.model.family.modules, found.model.geometry.layers[layer]) for layer in layers]
    assert all(folded) == (family != "exaone4")
    assert (not bases) == (len(layers) == len(ranks) and all(folded))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_decoder_beside_an_encoder(family, tmp_path):
    ranks, values = {6: {0: 5, 3: 4}}, {6: {0: 3}, 7: dict.fromkeys(range(8), 6)}  # decoder.0 and decoder.1
    found = convert(tmp_path, family, ranks, values=values)
    ids = ids_of()
    agree(found, decoder_input_ids=ids.flip(1))


@pytest.mark.parametrize(
    ("family", "layer", "why"),
    [
        ("bitnet", 0, "is normalised before"),
        ("qwen3_next", 1, "is scaled number by number"),
        ("olmo", 0, "its values are clipped"),
        ("bart", 0, "caches nothing"),
        ("bart", 12, "whose values are cached as they are"),
    ],
)
def test_values_that_cannot_be_narrower(family, layer, why, tmp_path):
    with pytest.raises(PlanError, match=why):
        convert(tmp_path, family, {}, values={layer: {0: 4}})


def test_values_that_are_clipped_in_other_models_of_the_family(tmp_path):
    agree(convert(tmp_path, "olmo", {}, values={1: {0: 4}}, clip_qkv=None))


@pytest.mark.parametrize(("family", "even"), [("llama", True), ("llama", False), ("gpt2", False), ("qwen2", False)])
def test_the_cache_holds_no_more_than_was_said(family, even, tmp_path):
    """Measured on a cache, and as the plan is priced: no number is padding."""
    ranks, values = ({}, {1: dict.fromkeys(range(4), 6)}) if even else ({2: {1: 5}}, {1: {0: 5, 2: 7}, 2: {1: 3}})
    if family == "gpt2":
        ranks, values = {2: {1: 5}, 3: dict.fromkeys(range(8), 4)}, {1: {0: 5, 2: 7}, 3: dict.fromkeys(range(8), 4)}
    found = convert(tmp_path, family, ranks, values=values)
    model = load_converted(found.folder)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids_of(10), **with_cache(model, cache))
        model(ids_of(1), **with_cache(model, cache))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * 11 * found.conversion.savings.cache_bytes_per_token.after
    size = found.model.geometry.layers[1].head_dim
    taken = sum(size - rank for side in (ranks, values) for told in side.values() for rank in told.values())
    change = found.conversion.savings.cache_bytes_per_token
    assert change.before - change.after == 4 * taken
