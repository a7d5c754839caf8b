"""Every cache of transformers under a model some of whose layers have fewer KV groups: these caches hold as many."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from support.cached_passes import stepwise, whole
from support.rounded_by_hand import BITS, bytes_of, made_by
from support.tiny_models import load_converted, with_cache
from support.whole_layers import convert_layers

LAYERS = {"llama": {0: "merge", 3: "{merge: {groups: 2}}"}, "gemma2": {0: "merge", 1: "merge"}}
LENGTH = 20


@pytest.fixture(scope="module", params=LAYERS)
def case(request, tmp_path_factory):
    """A converted model, and how many KV groups its layers have."""
    layers = LAYERS[request.param]
    model = load_converted(convert_layers(tmp_path_factory.mktemp(request.param), request.param, layers))
    left = [4] * 6
    for layer, told in layers.items():
        left[layer] = 1 if told == "merge" else 2
    return model, left


@pytest.fixture
def ids():
    return torch.randint(3, 120, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["of the config", "plain", "static"])
def test_caches_hold_as_many_kv_groups_as_are_left(case, ids, kind):
    model, left = case
    cache = {
        "of the config": lambda: DynamicCache(config=model.config),
        "plain": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }[kind]()
    torch.testing.assert_close(stepwise(model, ids, cache), whole(model, ids), atol=2e-5, rtol=1e-4)
    for slot in ("keys", "values"):
        assert [getattr(layer, slot).shape[1] for layer in cache.layers] == left


def test_a_cache_that_was_made_before_keeps_its_shape(case, ids):
    """It works, and saves nothing."""
    model, _ = case
    cache, config = StaticCache(config=model.config, max_cache_len=32), model.config
    shape = (2, config.num_key_value_heads, config.head_dim)
    cache.early_initialization(*shape, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(stepwise(model, ids, cache), whole(model, ids), atol=2e-5, rtol=1e-4)
    assert {layer.keys.shape[1] for layer in cache.layers} == {4}


@pytest.mark.parametrize("case", ["llama"], indirect=True)  # transformers quantises no sliding layer
@pytest.mark.parametrize("backend", BITS)
def test_quantised_caches_round_what_is_left(case, ids, backend):
    model, left = case
    cache = made_by(backend, model)
    error = (stepwise(model, ids, cache) - whole(model, ids)).abs()
    assert 0 < error.mean() < 0.1 * whole(model, ids).abs().mean()
    sizes = [bytes_of(layer) for layer in cache.layers]
    assert [4 * size for size in sizes] == [groups * sizes[left.index(4)] for groups in left]


def test_cropped_copied_and_repeated_caches(case, ids):
    model, _ = case
    cache = DynamicCache()  # a sliding layer could not be cropped once it is full
    with torch.no_grad():
        model(ids[:, :15], **with_cache(model, cache))
        cache.crop(-6)
        other = copy.deepcopy(cache)
        found = model(ids[:, 9:], **with_cache(model, cache)).logits
        other.batch_repeat_interleave(2)
        twice = model(ids[:, 9:].repeat_interleave(2, 0), **with_cache(model, other)).logits
    torch.testing.assert_close(found, whole(model, ids, 9), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(twice[::2], found, atol=2e-5, rtol=1e-4)


def test_what_the_base_cached_is_refused(case, ids):
    model, left = case
    layer = next(at for at, groups in enumerate(left) if groups < 4)
    cache = DynamicCache()
    for number in range(6):
        cache.update(*[torch.zeros(2, 4, 3, model.config.head_dim)] * 2, number)
    with pytest.raises(ValueError, match=f"layer {layer} of this model caches {left[layer]} heads of keys"):
        model(ids, **with_cache(model, cache))


def test_gradients_reach_all_projections_of_a_merged_layer(case, ids):
    model, left = case
    attention = model.model.layers[left.index(1)].self_attn
    model(ids, labels=ids).loss.backward()
    for side in "qkvo":
        assert getattr(attention, f"{side}_proj").weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


def test_a_copy_that_transformers_saves_is_the_same(case, ids, tmp_path):
    model, _ = case
    model.save_pretrained(tmp_path)
    again = load_converted(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_numbers_that_cannot_be_are_refused_by_the_carried_code(case):
    from types import SimpleNamespace

    from sa_convert.treatments.merge.runtime import Merge

    for told in (
        {group: {"groups": 3} for group in range(4)},
        {group: {"groups": 1} for group in range(3)},
        {group: {"groups": 1 + group % 2} for group in range(4)},
    ):
        stack = SimpleNamespace(layers={2: told}, told={2: told}, shapes={2: (8, 2, 16)}, sizes={2: (16, 4)})
        with pytest.raises(ValueError, match=r"layer 2 cannot have \d of its 4 KV groups left"):
            Merge(stack)
