"""Low-rank keys and values beside windows and borrowed attention, in one layer and in one KV group."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sa_convert.families.table import FAMILIES
from sa_convert.plan.savings import cache_at
from support.forced_windows import forced_windows
from support.low_rank_models import convert, projected
from support.tiny_models import attentions_of, load_converted, with_cache

RANKS = {1: {0: 7, 3: 7}, 2: {2: 6}, 4: {3: 5}}
VALUES = {1: {1: 6, 3: 5}, 3: {0: 4, 2: 7}, 4: {0: 6, 3: 4}, 5: dict.fromkeys(range(4), 5)}
WINDOW = {"window": {"sinks": 2, "tokens": 5}}
LENGTH = 24
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=["llama", "qwen3", "phi3"])
def case(request, tmp_path_factory):
    """Layer 1 has two groups with low-rank keys, one with a window, and a full one; layer 3 has a window. Layer 4 has a
    group that borrows and one with low-rank keys. Some of all kinds have low-rank values, too."""
    more = {
        1: {1: WINDOW},
        3: {0: WINDOW},
        4: {0: {"share": [[0, 0], [0, 1]]}},
    }
    found = convert(tmp_path_factory.mktemp(request.param), request.param, RANKS, more, VALUES)
    layers = found.model.geometry.layers
    size = layers[1].group_size
    windows = {1: dict.fromkeys(range(size, 2 * size), (2, 5)), 3: dict.fromkeys(range(size), (2, 5))}
    found.base.set_attn_implementation("eager")
    ids = torch.randint(3, 120, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return found, windows, ids, load_converted(found.folder, dtype=torch.float32)


@torch.no_grad()
def in_base(found, windows, ids):
    """Logits with projected keys, windows, and the shared head's probabilities, each forced in the base."""
    from support.forced_attention import forced_attention

    base = found.base
    row = [[0, 0], [0, 1], *[None] * (base.config.num_attention_heads - 2)]
    attentions = list(attentions_of(base, FAMILIES[found.family]))
    with projected(found), forced_attention(base, {4: row}), forced_windows(base, attentions, windows):
        return base(ids, use_cache=False).logits


@pytest.mark.parametrize("chunks", [(24,), (10, *[1] * 14), (3, 9, 1, 11)], ids=str)
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_steps_are_those_of_one_pass(case, chunks, static):
    found, windows, ids, model = case
    wanted = in_base(found, windows, ids)
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, **CLOSE)
    cache = StaticCache(config=model.config, max_cache_len=30) if static else DynamicCache(config=model.config)
    made, start = [], 0
    for count in chunks:
        made.append(model(ids[:, start : start + count], **with_cache(model, cache)).logits)
        start += count
    torch.testing.assert_close(torch.cat(made, dim=1), wanted, **CLOSE)


@torch.no_grad()
def test_caches_hold_what_was_said(case):
    found, _, ids, model = case
    if found.family == "phi3":
        pytest.skip("a cache of the base's own windows keeps one token less than they see")
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], **with_cache(model, cache))
    for at in range(20, LENGTH):
        model(ids[:, at : at + 1], **with_cache(model, cache))
    parts = [getattr(layer, "parts", {}).get("window") for layer in cache.layers]
    # Beside what is counted, a window keeps tokens that may be taken back.
    kept = [one for part in parts if part for one in part.kept.values()]
    assert {one.values.shape[-1] for one in kept} == {4, 6}
    spare = sum(states[:, :, 7:].nbytes for one in kept for states in (one.keys, one.values))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    held += sum(states.nbytes for one in kept for states in (one.keys, one.values)) - spare
    assert held == 2 * cache_at(found.model, found.conversion.plan, LENGTH)


def test_generation(case):
    _, _, ids, model = case
    wanted = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3}):
        plain = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False, num_beams=3)
        made = model.generate(ids, max_new_tokens=10, do_sample=False, **options)
        assert torch.equal(made, plain if "num_beams" in options else wanted), options


@torch.no_grad()
def test_a_layer_that_borrows_all_scores(tmp_path):
    from support.forced_attention import forced_attention

    row = [[0, head] for head in range(8)]
    shared = {3: {group: {"share": row[2 * group : 2 * group + 2]} for group in range(4)}}
    found = convert(tmp_path, "llama", {}, shared, {3: {0: 5, 2: 6}, 4: {1: 7}})
    ids = torch.randint(3, 120, (2, 20), generator=torch.Generator().manual_seed(0))
    found.base.set_attn_implementation("eager")
    with projected(found), forced_attention(found.base, {3: row}):
        wanted = found.base(ids, use_cache=False).logits
    for implementation in ("eager", "sdpa"):
        model = load_converted(found.folder, attn_implementation=implementation)
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, **CLOSE)
        cache = DynamicCache(config=model.config)
        made = [model(ids[:, :12], **with_cache(model, cache)).logits]
        made += [model(ids[:, at : at + 1], **with_cache(model, cache)).logits for at in range(12, 20)]
        torch.testing.assert_close(torch.cat(made, dim=1), wanted, **CLOSE)


@pytest.mark.parametrize("other", [WINDOW, {"share": [[0, 0], [0, 1]]}], ids=str)
def test_not_in_one_group(other, tmp_path):
    from sa_convert.errors import PlanError

    with pytest.raises(PlanError, match="together"):
        convert(tmp_path, "llama", {1: {1: 7}}, {1: {1: {"low_rank": {"keys": 4}, **other}}})
