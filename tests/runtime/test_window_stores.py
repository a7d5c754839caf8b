"""Windows in caches that keep their tokens elsewhere, or in few bits: of transformers itself, of quanto and of HQQ."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, QuantizedCache

from support.memory_models import some_ids
from support.rounded_by_hand import made_by
from support.tiny_models import with_cache
from support.windowed_models import EVERY, MIXED, Pair, in_pieces

LENGTH = 30
PLANS = {"mixed": MIXED, "every": EVERY}
OPTIONS = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}


class Away(torch.Tensor):
    """States on another device: what mixes them with states on this one raises, as torch does. Indices may come from
    anywhere, since callers move them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        given = [item for each in args for item in (each if isinstance(each, list | tuple) else [each])]
        with torch._C.DisableTorchFunctionSubclass():
            away = [isinstance(item, Away) for item in given if torch.is_tensor(item) and item.is_floating_point()]
        if any(away) and not all(away):
            raise RuntimeError(f"Expected all tensors to be on the same device, in {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Stream:
    def wait_stream(self, other):
        """Nothing here runs beside anything else."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing has to be finished."""


@pytest.fixture
def offloading(monkeypatch):
    """Two devices and their streams, on a CPU. Returns how often layers went and came."""
    moved = {"offload": 0, "prefetch": 0}

    def mover(name, kind):
        def move(layer):
            if layer.is_initialized and type(layer.keys) is not kind:
                layer.keys, layer.values = layer.keys.as_subclass(kind), layer.values.as_subclass(kind)
                moved[name] += 1

        return move

    monkeypatch.setattr(CacheLayerMixin, "offload", mover("offload", Away))
    monkeypatch.setattr(CacheLayerMixin, "prefetch", mover("prefetch", torch.Tensor))
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())
    return moved


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("plan", PLANS)
def test_offloaded(model_type, kind, plan, offloading):
    pair = Pair(model_type, PLANS[plan])
    for length in (4, 20):
        ids = some_ids(length)
        expected = pair.model.generate(ids, **OPTIONS)
        assert torch.equal(pair.model.generate(ids, cache_implementation=kind, **OPTIONS), expected)
    assert offloading["offload"] > 20
    assert offloading["prefetch"] > 20
    if kind == "offloaded":
        expected = pair.model.generate(ids, num_beams=3, **OPTIONS)
        assert torch.equal(pair.model.generate(ids, num_beams=3, cache_implementation=kind, **OPTIONS), expected)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_offloaded_in_pieces(plan, offloading):
    pair, ids = Pair("llama", PLANS[plan]), some_ids(LENGTH)
    cache = DynamicCache(config=pair.model.config, offloading=True)
    found, _ = in_pieces(pair.model, ids, [3, 5, 6, 13, 28, LENGTH], cache=cache)
    torch.testing.assert_close(found, pair.expected(ids), atol=1e-4, rtol=1e-4)
    cache.crop(-2)
    found = pair.model(ids[:, -2:], **with_cache(pair.model, cache)).logits
    torch.testing.assert_close(found, pair.expected(ids)[:, -2:], atol=1e-4, rtol=1e-4)


@pytest.fixture(params=["fp8", "quanto", "hqq"])
def made(request):
    """What makes a quantised cache of a backend."""
    if request.param == "fp8":
        return lambda model: QuantizedCache("fp8", model.config)
    return lambda model: made_by(request.param, model)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_few_bits(made, plan):
    """Windows are not rounded, so where every KV group has one nothing is; elsewhere, no more than in the base."""
    pair, ids = Pair("llama", PLANS[plan]), some_ids(LENGTH)
    expected = pair.expected(ids)
    plain, _ = in_pieces(pair.base, ids, [5, 9, *range(10, LENGTH + 1)], cache=made(pair.base))
    rounding = (plain - pair.base(ids, use_cache=False).logits).abs().max()
    for cuts in ([LENGTH], [5, 9, *range(10, LENGTH + 1)], [21, *range(22, LENGTH + 1)]):
        found, cache = in_pieces(pair.model, ids, cuts, cache=made(pair.model))
        assert (found - expected).abs().max() <= (1e-4 if plan == "every" else 2 * rounding)
        assert cache.get_seq_length() == LENGTH
    cache.reset()
    found, _ = in_pieces(pair.model, ids, [5, *range(6, LENGTH + 1)], cache=cache)
    assert (found - expected).abs().max() <= (1e-4 if plan == "every" else 2 * rounding)


@pytest.mark.parametrize("plan", PLANS)
def test_beams_in_few_bits(made, plan):
    pair, ids = Pair("llama", PLANS[plan]), some_ids(12)
    options = {**OPTIONS, "num_beams": 3, "output_logits": True, "return_dict_in_generate": True}
    found = pair.model.generate(ids, **with_cache(pair.model, made(pair.model)), **options)
    expected = pair.model.generate(ids, **options)
    if plan == "every":
        assert torch.equal(found.sequences, expected.sequences)
    assert (found.logits[1] - expected.logits[1]).abs().max() < 0.1 * expected.logits[1].abs().max()
