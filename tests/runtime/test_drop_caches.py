"""Every cache of transformers under a model whose first layers have no attention: it keeps nothing of these layers, and
its length and masks are right all the same."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from support.cached_passes import stepwise, whole
from support.tiny_models import load_converted, save_tiny, with_cache
from support.whole_layers import convert_layers

CASES = {"llama": (0, 2), "gemma3_text": (0, 1, 2), "gpt2": (0,)}
LENGTH = 20


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A converted model, and its layers without attention."""
    folder = tmp_path_factory.mktemp(request.param)
    layers = CASES[request.param]
    return load_converted(convert_layers(folder, request.param, dict.fromkeys(layers, "drop"))), layers


@pytest.fixture
def ids():
    return torch.randint(3, 120, (2, LENGTH), generator=torch.Generator().manual_seed(3))


class Rounded(QuantizedLayer):
    """Keeps states as bytes."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax().clamp(min=1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        return quantized[0].float() * quantized[1]


@pytest.mark.parametrize("kind", ["of the config", "plain", "static", "quantised"])
def test_it_counts_tokens_and_keeps_nothing(case, ids, kind):
    model, layers = case
    cache = {
        "of the config": lambda: DynamicCache(config=model.config),
        "plain": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
        "quantised": lambda: Cache(layers=[Rounded(residual_length=3) for _ in range(model.config.num_hidden_layers)]),
    }[kind]()
    found, wanted = stepwise(model, ids, cache), whole(model, ids)
    if kind == "quantised":
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    else:
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert int(cache.get_seq_length()) == LENGTH
    held = [layer.keys is not None for layer in cache.layers]
    assert held == [number not in layers for number in range(len(cache.layers))]
    cache.reset()
    torch.testing.assert_close(stepwise(model, ids, cache), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [3, 7])
def test_prefill_in_chunks(case, ids, size):
    model, _ = case
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **options), expected)


@torch.no_grad()
def test_beams_rows_and_tokens_can_be_taken_from_a_cache(case, ids):
    model, _ = case
    ids = ids[:, :7]  # a sliding cache that has lost tokens cannot be cropped by the library either
    cut, last = ids.shape[1] - 3, ids[:, -3:]
    expected = model(ids, use_cache=False).logits[:, -3:]
    cache = DynamicCache(config=model.config)
    model(ids, **with_cache(model, cache))
    cache.crop(-3)
    assert cache.get_seq_length() == cut
    again = model(last, **with_cache(model, cache)).logits
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
    changes = {
        "reorder_cache": (torch.tensor([1, 1]), [1, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1]),
        "batch_select_indices": (torch.tensor([1]), [1]),
    }
    for change, (argument, rows) in changes.items():
        cache = DynamicCache(config=model.config)
        model(ids[:, :cut], **with_cache(model, cache))
        getattr(cache, change)(argument)
        found = model(last[rows], **with_cache(model, cache)).logits
        torch.testing.assert_close(found, expected[rows], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_copies_of_a_cache_count_on_their_own(case, ids):
    model, _ = case
    cut = 14
    cache = DynamicCache(config=model.config)
    model(ids[:, :cut], **with_cache(model, cache))
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for other in (copy.deepcopy(cache), torch.load(file, weights_only=False), cache):
        logits = [model(ids[:, at : at + 1], **with_cache(model, other)).logits for at in range(cut, LENGTH)]
        torch.testing.assert_close(torch.cat(logits, dim=1), whole(model, ids, cut), atol=1e-4, rtol=1e-4)
        assert other.get_seq_length() == LENGTH


def test_the_cache_of_another_model_is_refused(case, ids, tmp_path):
    model, layers = case
    base = save_tiny(model.config.model_type.removeprefix("shared_attention_"), tmp_path / "base")
    cache = DynamicCache(config=base.config)
    base(ids, **with_cache(base, cache))
    with pytest.raises(ValueError, match=f"layer {layers[0]} of this model has no attention and caches nothing"):
        model(ids, **with_cache(model, cache))


def test_assisted_generation_takes_tokens_back(case, ids):
    model, _ = case
    options = {"max_new_tokens": 5, "do_sample": False}
    prompt = ids[:1, :3]  # within the window of sliding layers
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, **options), expected)


def test_a_compiled_step_with_a_static_cache(case, ids):
    model, layers = case
    cache = StaticCache(config=model.config, max_cache_len=32)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model, backend=counting)
    with torch.no_grad():
        found = [model(ids[:, :8], **with_cache(model, cache)).logits[:, :0]]
        found += [step(ids[:, at : at + 1], **with_cache(model, cache)).logits for at in range(8, LENGTH)]
        made = len(graphs)
    torch.testing.assert_close(torch.cat(found, dim=1), whole(model, ids), atol=1e-4, rtol=1e-4)
    assert all(cache.layers[number].keys is None for number in layers)
    assert made <= 6  # not one for every length
