"""Layers with windows take short ways while nothing is different, and for one token. What has to be right where a pass
that took one is followed by a pass that cannot: padding that comes later, tokens taken back, beams, gradients."""

import pytest
import torch
from transformers import DynamicCache

from sa_convert.treatments.window.runtime import OneToken
from support.memory_models import some_ids
from support.tiny_models import with_cache
from support.windowed_models import EVERY, MIXED, Pair, in_pieces, positions

LENGTH = 30
PLANS = {"mixed": MIXED, "every": EVERY}
TYPES = ("llama", "gemma3_text")


@pytest.fixture(scope="module", params=[(name, plan) for name in TYPES for plan in PLANS], ids="-".join)
def pair(request):
    return Pair(request.param[0], PLANS[request.param[1]])


@torch.no_grad()
def read(pair, cache, ids, mask, start, cuts):
    """Logits of the tokens from `start` on, in pieces up to these places. The mask is given if it says something."""
    found = []
    for stop in cuts:
        given = {"position_ids": positions(mask)[:, start:stop]}
        given |= {} if mask[:, :stop].all() else {"attention_mask": mask[:, :stop]}
        found.append(pair.model(ids[:, start:stop], **given, **with_cache(pair.model, cache)).logits)
        start = stop
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("then", [[LENGTH], list(range(4, LENGTH + 1))], ids=["chunk", "steps"])
@pytest.mark.parametrize("padding", [(3, 5), (5, 6), (9, 12), (20, 22)], ids=str)
def test_padding_that_comes_later(pair, padding, then):
    """Nothing was known of padding in the first passes, and it comes before, as, or after windows are outgrown."""
    ids, mask = some_ids(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(*padding)] = 0
    cuts = [*range(1, padding[0] + 1), *[stop for stop in then if stop > padding[0]]]
    expected, real = pair.expected(ids, mask, position_ids=positions(mask)), mask.bool()
    found = read(pair, DynamicCache(config=pair.model.config), ids, mask, 0, cuts)
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop", [5, 6, 7, 8, 9, 14, 20])
def test_taken_back_and_padded_then(pair, stop):
    """What is read after tokens were taken back has padding, which those before had not."""
    ids, mask, cache = some_ids(LENGTH), torch.ones(2, LENGTH, dtype=torch.long), DynamicCache(config=pair.model.config)
    if hasattr(cache, "activate_past_recording"):  # of families' own windows
        cache.activate_past_recording()
    elif "gemma3" in pair.model.config.model_type:
        pytest.skip("transformers 4 takes nothing back from sliding windows")
    others, first = ids.flip(0), stop - 3
    read(pair, cache, torch.cat([ids[:, :first], others[:, first:]], dim=1), mask, 0, range(1, stop + 1))
    cache.crop(first - stop)
    mask[1, first + 1 : first + 3] = 0
    expected, real = pair.expected(ids, mask, position_ids=positions(mask))[:, first:], mask.bool()[:, first:]
    found = read(pair, cache, ids, mask, first, [first + 2, *range(first + 3, LENGTH + 1)])
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
def test_rows_change_before_and_after_windows_are_outgrown(pair, change):
    ids, mask = some_ids(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    for first in (4, 5, 8, 12):
        cache = DynamicCache(config=pair.model.config)
        read(pair, cache, ids, mask, 0, range(1, first + 1))
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
            rows = [1, 0]
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            rows = [0, 0, 1, 1]
        else:
            cache.batch_select_indices(torch.tensor([1]))
            rows = [1]
        found = read(pair, cache, ids[rows], mask[:1].expand(len(rows), -1), first, range(first + 1, LENGTH + 1))
        torch.testing.assert_close(found, pair.expected(ids)[rows][:, first:], atol=1e-4, rtol=1e-4)


def test_a_cache_that_is_used_again(pair):
    """What a cache of the text before knew of windows does not outlive `reset`."""
    ids, mask = some_ids(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    cache = DynamicCache(config=pair.model.config)
    if not hasattr(type(cache), "reset"):
        pytest.skip("this transformers resets no dynamic cache")
    read(pair, cache, ids.flip(0), mask, 0, range(1, LENGTH + 1))
    cache.reset()
    found = read(pair, cache, ids, mask, 0, range(1, LENGTH + 1))
    torch.testing.assert_close(found, pair.expected(ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_step_copies_no_cache_before_windows_are_outgrown():
    """The third token on is written into room that is there."""
    pair, ids = Pair("llama", {0: {0: (2, 20)}}), some_ids(8)
    cache = DynamicCache(config=pair.model.config)
    read(pair, cache, ids, torch.ones(2, 8, dtype=torch.long), 0, [4, 5, 6])
    before = cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()
    read(pair, cache, ids, torch.ones(2, 8, dtype=torch.long), 6, [7, 8])
    assert (cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()) == before


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {}], ids=str)
@pytest.mark.parametrize("length", [1, 3, 6])
def test_short_prompts(pair, length, options):
    """Generation begins where nothing is different, and goes on to where windows are outgrown."""
    ids, told = some_ids(length)[:1], {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with pair.forced():
        expected = pair.base.generate(ids, use_cache=False, **told, **({} if "num_beams" not in options else options))
    assert torch.equal(pair.model.generate(ids, **told, **options), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_gradients_of_short_texts(length, checkpointing):
    pair, ids = Pair("llama", MIXED), some_ids(length)
    pair.model.train()
    if checkpointing:
        pair.model.gradient_checkpointing_enable()
    pair.model(ids, labels=ids, use_cache=False).loss.backward()
    with pair.forced():
        pair.base(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(pair.base.named_parameters())
    for name, parameter in pair.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-3, msg=name)


def test_a_cache_that_is_filled_with_gradients_wanted(pair):
    """The slots are written in place, but not those that a gradient needs."""
    ids, cache = some_ids(14)[:1], DynamicCache(config=pair.model.config)
    logits = [pair.model(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits for at in range(14)]
    pair.model.zero_grad()
    torch.cat(logits, dim=1).square().mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in pair.model.named_parameters()}
    pair.base.zero_grad()
    with pair.forced():
        pair.base(ids, use_cache=False).logits.square().mean().backward()
    for name, parameter in pair.base.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_which_layers_have_none():
    """What changes something from the first token on, or in another way than windows, leaves no short way."""
    more = {2: {1: {"share": [[0, 7], [0, 6]]}, 3: {"share": [None, [1, 2]]}}}
    model = Pair("llama", {0: {0: (2, 4), 2: (1, 6)}, 2: {0: (2, 5)}, 3: {1: (0, 3), 2: (1, 7)}}, more=more).model
    plain = {layer: model.model.layers[layer].self_attn.plan.plain for layer in (0, 2, 3)}
    assert plain == {0: 0, 2: 0, 3: 3}  # the first lends, the second borrows


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_the_short_way_is_taken(monkeypatch, plan):
    """By one token in every layer with windows, and not if padding is among what they have."""
    pair, taken = Pair("llama", PLANS[plan]), []
    attend = OneToken.attend
    monkeypatch.setattr(OneToken, "attend", lambda self, *args: taken.append(1) or attend(self, *args))
    ids, mask = some_ids(20), torch.ones(2, 20, dtype=torch.long)
    _, cache = in_pieces(pair.model, ids[:, :18], [18])
    read(pair, cache, ids, mask, 18, [19])
    assert len(taken) == len(PLANS[plan])
    mask[0, 3] = 0
    _, cache = in_pieces(pair.model, ids[:, :18], [18], mask)
    before = len(taken)
    read(pair, cache, ids, mask, 18, [19])
    assert len(taken) == before
