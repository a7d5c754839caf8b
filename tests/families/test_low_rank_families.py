"""Low-rank keys: every kind of family computes what its base does with keys projected before they are turned."""

import pytest
import torch

from sa_convert.errors import PlanError
from support.low_rank_models import convert, projected_keys, projected_logits
from support.tiny_models import load_converted

RANKS = {1: {0: 5, 1: 4}, 2: {0: 6, 1: 6, 2: 6, 3: 6}, 4: {3: 6}}
# Biases; norms of keys before and after they are split in heads; ropes of several kinds, in part, of neighbours, or in
# some layers only; windows; sinks; fused projections; no ropes at all.
FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "olmo", "olmo2", "cohere", "cohere2", "smollm3", "glm", "gpt_oss"),
    *("phi3", "gpt_neox", "phi", "stablelm", "nemotron", "qwen2_moe", "falcon", "gpt2", "opt", "bloom"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_base_does_with_projected_keys(family, tmp_path):
    ranks = {1: {0: 5}} if family == "falcon" else RANKS  # which has one KV group
    found = convert(tmp_path, family, ranks)
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = projected_logits(found, ids)
    with torch.no_grad(), projected_keys(found):
        tokens = found.base.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
    with torch.no_grad():
        assert (found.base(ids, use_cache=False).logits - wanted).abs().max() > 1e-3  # it does change something
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not found.base._supports_sdpa:
            continue
        model = load_converted(found.folder, attn_implementation=implementation)
        with torch.no_grad():
            torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(model(ids, use_cache=True).logits, wanted, atol=2e-5, rtol=1e-4)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            made = model.generate(ids, max_new_tokens=10, do_sample=False, **options)
            assert torch.equal(made, tokens), (implementation, options)


def test_a_decoder_beside_an_encoder(tmp_path):
    found = convert(tmp_path, "bart", {6: {0: 5, 3: 4}})  # decoder.0
    ids = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = projected_logits(found, ids, decoder_input_ids=ids.flip(1))
    model = load_converted(found.folder)
    with torch.no_grad():
        told = model(ids, decoder_input_ids=ids.flip(1), use_cache=True)
        torch.testing.assert_close(told.logits, wanted, atol=2e-5, rtol=1e-4)
    with torch.no_grad(), projected_keys(found):
        tokens = found.base.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), tokens)


@pytest.mark.parametrize(
    ("family", "layer", "why"),
    [
        ("gptj", 0, "in their own code"),
        ("llama4_text", 0, "complex numbers"),
        ("bart", 0, "caches nothing"),
        ("bart", 12, "what an encoder has read"),
    ],
)
def test_what_cannot_be_is_refused(family, layer, why, tmp_path):
    with pytest.raises(PlanError, match=why):
        convert(tmp_path, family, {layer: {0: 4}})


def test_ropes_that_change_with_the_length_are_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(PlanError, match="changes as the text grows"):
        convert(tmp_path, "llama", {0: {0: 4}}, rope_parameters=rope)


def test_keys_that_are_scaled_as_they_are_turned(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    found = convert(tmp_path, "llama", {1: {0: 8}}, rope_parameters=rope)
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    model = load_converted(found.folder)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, use_cache=True).logits, projected_logits(found, ids), atol=2e-5, rtol=1e-4
        )
