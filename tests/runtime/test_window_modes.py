"""Ways to generate with windows, beside greedy ones: each gives what the same way gives without a cache."""

import pytest
import torch

from support.forced_rows import forced_rows
from support.memory_models import some_ids
from support.windowed_models import EVERY, MIXED, Pair

MODES = {
    "sampling": {"do_sample": True, "top_k": 8, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "top_k": 8},
    "guidance": {"guidance_scale": 1.7},
    "repetition": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module", params=[("llama", MIXED), ("gemma3_text", EVERY)], ids=["llama", "gemma3"])
def pair(request):
    return Pair(*request.param)


def generated(model, ids, **options):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, **options})


@pytest.mark.parametrize("mode", MODES)
def test_modes(pair, mode):
    ids, options = some_ids(11), dict(MODES[mode])
    if mode == "guidance":  # it runs the model on its own prompt besides
        options["negative_prompt_ids"] = ids.flip(1)[:, :4]
    with pair.forced():
        expected = generated(pair.base, ids, use_cache=False, **options)
    assert torch.equal(generated(pair.model, ids, **options), expected)


@pytest.mark.parametrize("length", [5, 40])
def test_drafts(pair, length):
    """The whole draft may be refused; the draft's model has windows, too."""
    ids = some_ids(length)[:1]
    with pair.forced():
        expected = generated(pair.base, ids, use_cache=False, max_new_tokens=40)
    other = Pair("llama", EVERY, vocab_size=pair.model.config.vocab_size).model
    for helped in (
        {"assistant_model": other},
        {"assistant_model": pair.model},
        {"prompt_lookup_num_tokens": 10},
    ):
        assert torch.equal(generated(pair.model, ids, max_new_tokens=40, **helped), expected), helped


def test_turns(pair):
    """A cache is handed on from turn to turn: the same as the whole text at once."""
    from transformers import DynamicCache

    from sa_convert.models.arguments import cache_keyword

    ids, cache = some_ids(60)[:1], DynamicCache(config=pair.model.config)
    text = ids[:, :9]
    for stop in (30, 45, 60):
        given = {cache_keyword(pair.model): cache}
        text = torch.cat([generated(pair.model, text, max_new_tokens=6, **given), ids[:, stop - 8 : stop]], dim=1)
    with forced_rows(pair.attentions, pair.plan, pair.groups):
        expected = generated(pair.base, text, use_cache=False)
    assert torch.equal(generated(pair.model, text, **{cache_keyword(pair.model): cache}), expected)
