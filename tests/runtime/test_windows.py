"""Windows in a running model: what the base computes if its scores are masked by their definition."""

import pytest
import torch
from transformers import DynamicCache

from support.memory_models import some_ids
from support.tiny_models import with_cache
from support.windowed_models import EVERY, MIXED, Pair

LENGTH = 30
# Whole; in two and in many pieces; one by one, at once or after a prompt that is shorter or longer than windows.
CUTS = {
    "whole": [30],
    "two": [12, 30],
    "many": [3, 5, 6, 7, 8, 13, 14, 15, 28, 29, 30],
    "steps": list(range(1, 31)),
    "prompt": [21, *range(22, 31)],
}
FAMILIES = [(name, kernel) for name in ("llama", "mistral", "gemma3_text", "qwen3") for kernel in ("sdpa", "eager")]
FAMILIES += [("gemma2", "eager"), ("gpt_oss", "eager")]  # these refuse SDPA


def padded(side):
    """Two rows of tokens, of which one has padding at this side, and their mask."""
    ids, mask = some_ids(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, 9) if side == "left" else slice(LENGTH - 9, None)] = 0
    return ids, mask


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def in_pieces(model, ids, cuts, mask=None, cache=None):
    """Logits of all tokens, some at a time, and the cache."""
    cache, found, start = cache or DynamicCache(config=model.config), [], 0
    for stop in cuts:
        given = (
            {"position_ids": positions(mask)[:, start:stop], "attention_mask": mask[:, :stop]}
            if mask is not None
            else {}
        )
        found.append(model(ids[:, start:stop], **given, **with_cache(model, cache)).logits)
        start = stop
    return torch.cat(found, dim=1), cache


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def pair(request):
    return Pair(request.param[0], kernel=request.param[1])


@torch.no_grad()
def test_without_a_cache(pair):
    ids = some_ids(LENGTH)
    expected = pair.expected(ids)
    torch.testing.assert_close(pair.model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    assert (pair.base(ids, use_cache=False).logits - expected).abs().max() > 0.01


@pytest.mark.parametrize("cuts", CUTS)
def test_with_a_cache(pair, cuts):
    ids = some_ids(LENGTH)
    found, _ = in_pieces(pair.model, ids, CUTS[cuts])
    torch.testing.assert_close(found, pair.expected(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [None, *CUTS])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(pair, side, cuts):
    ids, mask = padded(side)
    expected = pair.expected(ids, mask, position_ids=positions(mask))
    if cuts is None:
        found = pair.model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    else:
        found, _ = in_pieces(pair.model, ids, CUTS[cuts], mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("cuts", CUTS)
def test_all_groups_of_all_layers(kernel, cuts):
    pair, ids = Pair("llama", EVERY, kernel), some_ids(LENGTH)
    found, cache = in_pieces(pair.model, ids, CUTS[cuts])
    torch.testing.assert_close(found, pair.expected(ids), atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == LENGTH
    assert cache.get_mask_sizes(1, 0) == (LENGTH + 1, 0)


@pytest.mark.parametrize("plan", [MIXED, EVERY], ids=["mixed", "every"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate(plan, beams):
    pair = Pair("llama", plan)
    ids, mask = padded("left")
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "num_beams": beams,
        "eos_token_id": None,
        "attention_mask": mask,
    }
    with pair.forced(mask):
        expected = pair.base.generate(ids, use_cache=False, **options)
    assert torch.equal(pair.model.generate(ids, **options), expected)
    assert torch.equal(pair.model.generate(ids, prefill_chunk_size=7, **options), expected)
