"""Room in a full cache. In a model of one layer nothing depends on what went, so that the cache is that of the shorter
text, which is computed anew here; in deeper models its first layer is."""

import pytest
import torch

from sa_convert.errors import SessionError
from sa_convert.sessions.overflow import first_kept, make_room
from support.memory_models import made, some_ids
from support.session_models import MODELS, model_named, new_cache, read
from support.windowed_models import Pair

LENGTH, GONE, MORE = 40, 15, 6
CLOSE = {"atol": 2e-4, "rtol": 1e-3}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = {
    "llama": {},
    "llama, scaled": {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
    "llama, yarn": {
        "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    },
    "llama, llama3": {
        "rope_parameters": {
            **ROPE,
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 16,
        }
    },
    "gpt_neox": {},
    "cohere": {},
    "glm": {},
    "phi": {},
    "qwen3": {},
    "stablelm": {},
    "falcon": {},
    "falcon, alibi": {"alibi": True},
    "bloom": {},
    "smollm3": {},
    "gemma3_text": {},
}


@torch.no_grad()
def compare(model, kind="dynamic", gone=GONE, sinks=4, pieces=(MORE,), close=CLOSE, ids=None):
    """After room was made, and in a shorter text from the beginning: logits of what follows."""
    ids = some_ids(LENGTH + MORE) if ids is None else ids
    cache, fresh = new_cache(model, kind, 60), new_cache(model, kind, 60)
    read(model, cache, ids[:, :LENGTH], [LENGTH - 2, 1, 1])
    first = make_room(cache, model, gone, sinks)
    assert first == first_kept(cache, sinks)
    assert int(cache.get_seq_length()) == LENGTH - gone
    shorter = torch.cat([ids[:, :first], ids[:, first + gone :]], dim=1)
    read(model, fresh, shorter[:, : LENGTH - gone], [LENGTH - gone])
    found = read(model, cache, shorter[:, LENGTH - gone :], pieces)
    wanted = read(model, fresh, shorter[:, LENGTH - gone :], pieces)
    torch.testing.assert_close(found, wanted, **close)
    return cache


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, kind):
    changes = {"num_hidden_layers": 1, **FAMILIES[family]}
    if family == "gemma3_text":
        changes |= {"layer_types": ["sliding_attention"], "sliding_window": 8}
    if family == "smollm3":
        changes |= {"no_rope_layers": [0]}
    if kind == "static" and "alibi" in changes:
        pytest.skip("the base does not run with a static cache")
    model = made(family.partition(",")[0], share=False, **changes)
    compare(model, kind)
    compare(model, kind, pieces=(1,) * MORE)
    compare(model, kind, gone=1, sinks=0)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("gone", [3, 15, 29])
@pytest.mark.parametrize("plan", [{0: (2, 5)}, dict.fromkeys(range(4), (2, 5)), {0: (3, 7), 1: (0, 4), 2: (4, 30)}])
def test_windows(plan, gone, kind):
    """After 29 tokens have gone, the largest window is partly empty."""
    pair = Pair("llama", {0: plan}, num_hidden_layers=1)
    for pieces in ((MORE,), (1,) * MORE, (2, 1, 3)):
        compare(pair.model, kind, gone, pieces=pieces)


def test_windows_beside_low_rank_keys_and_without_rotation(tmp_path):
    from support.low_rank_models import convert
    from support.session_models import WINDOW
    from support.tiny_models import load_converted

    for family in ("llama", "gpt_neox"):
        (tmp_path / family).mkdir()
        for name, more in (("low", {}), ("both", {0: {1: WINDOW}})):
            found = convert(tmp_path / family / name, family, {0: {0: 7, 3: 6}}, more, num_hidden_layers=1)
            model = load_converted(found.folder, dtype=torch.float32)
            for kind in ("dynamic", "static"):
                compare(model, kind)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", [name for name in MODELS if "hybrid" not in name])
@torch.no_grad()
def test_deeper_models(name, kind):
    """The first layer is that of the shorter text. Values are those of before."""
    model, ids = model_named(name), some_ids(LENGTH)
    cache, fresh, before = (new_cache(model, kind, 60) for _ in range(3))
    for one in (cache, before):
        read(model, one, ids, [LENGTH - 1, 1])
    first = make_room(cache, model, GONE)
    shorter = torch.cat([ids[:, :first], ids[:, first + GONE :]], dim=1)
    read(model, fresh, shorter, [LENGTH - GONE])
    found, wanted = cache.layers[0], fresh.layers[0]
    for slot in ("keys", "values") if found.keys is not None else ():
        pair = (getattr(layer, slot)[:, :, : LENGTH - GONE] for layer in (found, wanted))
        torch.testing.assert_close(*pair, **CLOSE)
    for layer, old in zip(cache.layers, before.layers, strict=True):
        if getattr(layer, "values", None) is None or getattr(layer, "is_sliding", False):
            continue
        states = old.values if old.values.numel() else old.keys  # the slot of keys has the values if there are no keys
        kept = torch.cat([states[:, :, :first], states[:, :, first + GONE : LENGTH]], dim=2)
        found = (layer.values if old.values.numel() else layer.keys)[:, :, : LENGTH - GONE]
        assert torch.equal(found, kept)
    assert read(model, cache, ids[:, :3], [1, 2]).isfinite().all()


def test_again_and_again():
    """Turned by 1 for 300 times, keys are where they are after one turn by 300."""
    model = made("llama", share=False, num_hidden_layers=1)
    ids = some_ids(340)
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [340])
    for _ in range(300):
        make_room(cache, model, 1)
    shorter = torch.cat([ids[:, :4], ids[:, 304:]], dim=1)
    fresh = new_cache(model, "dynamic")
    read(model, fresh, shorter, [40])
    torch.testing.assert_close(cache.layers[0].keys, fresh.layers[0].keys, atol=1e-3, rtol=1e-3)


REFUSED = {
    "gpt2": ({}, "positions are added"),
    "opt": ({}, "positions are added"),
    "gptj": ({}, "gptj"),
    "llama": ({"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "depend on the length"),
    "qwen3_next": ({}, "one state of the whole text"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    changes, message = REFUSED[family]
    model = made(family, share=False, **changes)
    cache, ids = new_cache(model, "dynamic"), some_ids(20)
    read(model, cache, ids, [20])
    with pytest.raises(SessionError, match=message):
        make_room(cache, model, 5)
    assert int(cache.get_seq_length()) == 20


def test_what_a_layer_has_lost_is_refused_and_nothing_has_changed():
    model, ids = made("gemma3_text", share=False, sliding_window=12), some_ids(LENGTH + 4)
    cache, untouched = new_cache(model, "dynamic"), new_cache(model, "dynamic")
    for one in (cache, untouched):
        read(model, one, ids[:, :LENGTH], [LENGTH])
    with pytest.raises(SessionError, match="keeps fewer tokens"):
        make_room(cache, model, 30)
    with pytest.raises(SessionError, match="the first 4 stay"):
        make_room(cache, model, LENGTH)
    found, wanted = (read(model, one, ids[:, LENGTH:], [4]) for one in (cache, untouched))
    assert torch.equal(found, wanted)


def test_padded_rows_are_refused():
    model, ids = model_named("windows"), some_ids(LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    cache = new_cache(model, "dynamic")
    read(model, cache, ids, [LENGTH], mask)
    with pytest.raises(SessionError, match="padded"):
        make_room(cache, model, GONE)
