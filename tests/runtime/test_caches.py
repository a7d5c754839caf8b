"""Every cache of transformers under a converted model: right results, and no keys of reusing heads in them."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from support.cached_passes import stepwise, whole
from support.processes import run_cli
from support.tiny_models import geometry_of_folder, load_converted, make_map, save_tiny, with_cache, write_recipe

CASES = [("llama", "span"), ("llama", "groups"), ("gemma2", "heads")]
LENGTH = 20


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A converted model, its map and its geometry."""
    family, kind = request.param
    folder = tmp_path_factory.mktemp(family)
    save_tiny(family, folder / "base")
    geometry = geometry_of_folder(folder / "base")
    rows = make_map(kind, geometry)
    recipe = write_recipe(folder / "recipe.json", rows)
    done = run_cli("convert", folder / "base", "--recipe", recipe, "-o", folder / "out", "--no-validate")
    assert done.returncode == 0, done.stderr
    return load_converted(folder / "out", dtype=torch.float32), rows, geometry


@pytest.fixture
def ids():
    torch.manual_seed(3)
    return torch.randint(3, 128, (2, LENGTH))


def kept(rows, geometry, index):
    """Heads that a layer stores: keys of groups with an own head, and all values."""
    layer = geometry.layers[index]
    row = rows.get(index, [None] * layer.heads)
    return len({layer.group_of(head) for head in range(layer.heads) if row[head] is None}) + layer.groups


def test_static_cache_holds_no_keys_of_reusing_heads(case, ids):
    model, rows, geometry = case
    cache = StaticCache(config=model.config, max_cache_len=32)
    torch.testing.assert_close(stepwise(model, ids, cache), whole(model, ids), atol=1e-4, rtol=1e-4)
    for index, layer in enumerate(cache.layers):
        heads = layer.keys.shape[1] + (layer.values.shape[1] if layer.values.numel() else 0)
        assert heads == kept(rows, geometry, index)


class Rounded(QuantizedLayer):
    """Keeps states as bytes; like real quantisers, it cannot take a tensor without elements."""

    def _quantize(self, tensor, axis):
        if not tensor.numel():
            raise ValueError("nothing to quantise")
        scale = tensor.abs().amax().clamp(min=1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        return quantized[0].float() * quantized[1]


def test_quantized_cache(case, ids):
    model, rows, geometry = case
    cache = Cache(layers=[Rounded(residual_length=3) for _ in geometry.layers])
    logits, expected = stepwise(model, ids, cache), whole(model, ids)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    for index, layer in enumerate(cache.layers):
        quantized = [layer._quantized_keys[0], layer._quantized_values[0]]
        numbers = sum(int((part != 0).any(2).any(0).sum()) for part in quantized)  # heads may be filled up with zeros
        assert numbers == kept(rows, geometry, index) * geometry.layers[index].head_dim


@pytest.mark.parametrize("size", [3, 7])
def test_prefill_in_chunks(case, ids, size):
    model, *_ = case
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=size, **options), expected)


@torch.no_grad()
def test_beams_rows_and_tokens_can_be_taken_from_a_cache(case, ids):
    model, rows, geometry = case
    if geometry.layers[0].window:  # a sliding cache that has lost tokens cannot be cropped by the library either
        ids = ids[:, :7]
    cut, last = ids.shape[1] - 3, ids[:, -3:]
    expected = model(ids, use_cache=False).logits[:, -3:]

    cache = DynamicCache(config=model.config)
    model(ids, **with_cache(model, cache))
    cache.crop(-3)
    again = model(last, **with_cache(model, cache)).logits
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)

    cache = DynamicCache(config=model.config)
    model(ids[:, :cut], **with_cache(model, cache))
    cache.reorder_cache(torch.tensor([1, 1]))
    twice = model(last[[1, 1]], **with_cache(model, cache)).logits
    torch.testing.assert_close(twice, expected[[1, 1]], atol=1e-4, rtol=1e-4)

    cache = DynamicCache(config=model.config)
    model(ids[:, :cut], **with_cache(model, cache))
    cache.batch_repeat_interleave(2)
    four = model(last.repeat_interleave(2, dim=0), **with_cache(model, cache)).logits
    torch.testing.assert_close(four, expected.repeat_interleave(2, dim=0), atol=1e-4, rtol=1e-4)

    cache = DynamicCache(config=model.config)
    model(ids[:, :cut], **with_cache(model, cache))
    cache.batch_select_indices(torch.tensor([1]))
    one = model(last[1:], **with_cache(model, cache)).logits
    torch.testing.assert_close(one, expected[1:], atol=1e-4, rtol=1e-4)
    for index, layer in enumerate(cache.layers):
        heads = layer.keys.shape[1] + (layer.values.shape[1] if layer.values.numel() else 0)
        assert heads == kept(rows, geometry, index)


@torch.no_grad()
def test_steps_do_not_copy_what_reusing_layers_cached(case, ids):
    model, rows, geometry = case
    ids = ids[:, :12].repeat(1, 5)
    cache = DynamicCache(config=model.config)
    model(ids[:, :40], **with_cache(model, cache))
    reusing = [cache.layers[index] for index in rows if kept(rows, geometry, index) < 2 * geometry.layers[index].groups]
    assert reusing
    places, logits = [], []
    for at in range(40, 60):
        logits.append(model(ids[:, at : at + 1], **with_cache(model, cache)).logits)
        places.append([layer.keys.data_ptr() for layer in reusing])
        for layer in reusing:
            room = layer.keys.untyped_storage().nbytes() / layer.keys.nbytes
            assert room <= 1 + 1 / 16 + 16 / at
    torch.testing.assert_close(torch.cat(logits, dim=1), whole(model, ids, 40), atol=1e-4, rtol=1e-4)
    if not geometry.layers[0].window:
        assert len({tuple(place) for place in places}) <= 3  # the library's copy would make it 20


@torch.no_grad()
def test_caches_that_part_do_not_write_into_each_other(case, ids):
    """One prompt continued in several ways: by a deep copy, a shallow one, a saved one, and after a crop."""
    model, _, geometry = case
    ids, cut = (ids[:, :7], 4) if geometry.layers[0].window else (ids, 14)
    cache = DynamicCache(config=model.config)
    stepwise(model, ids[:, :cut], cache, first=2)
    others = torch.flip(ids, dims=[0])[:, cut:]
    expected = whole(model, ids, cut)
    changed = whole(model, torch.cat([ids[:, :cut], others], dim=1), cut)

    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    branches = [cache, shallow, copy.deepcopy(cache), torch.load(file, weights_only=False)]
    results = [[] for _ in branches]
    for at in range(ids.shape[1] - cut):
        for index, branch in enumerate(branches):
            tokens = (others if index % 2 else ids[:, cut:])[:, at : at + 1]
            results[index].append(model(tokens, **with_cache(model, branch)).logits)
    for index, logits in enumerate(results):
        wanted = changed if index % 2 else expected
        torch.testing.assert_close(torch.cat(logits, dim=1), wanted, atol=1e-4, rtol=1e-4)

    kept_view = [layer.keys.clone() for layer in cache.layers], [layer.keys for layer in cache.layers]
    cache.crop(cut - ids.shape[1])
    logits = [model(others[:, at : at + 1], **with_cache(model, cache)).logits for at in range(others.shape[1])]
    torch.testing.assert_close(torch.cat(logits, dim=1), changed, atol=1e-4, rtol=1e-4)
    for before, now in zip(*kept_view, strict=True):
        assert torch.equal(before, now)


def test_a_cache_goes_through_inference_mode_and_back(case, ids):
    model, _, geometry = case
    ids = ids[:, :7] if geometry.layers[0].window else ids
    cache, logits = DynamicCache(config=model.config), []
    with torch.inference_mode():
        model(ids[:, :1], **with_cache(model, cache))
        logits += [model(ids[:, at : at + 1], **with_cache(model, cache)).logits for at in range(1, 4)]
    with torch.no_grad():
        logits += [model(ids[:, at : at + 1], **with_cache(model, cache)).logits for at in range(4, 6)]
    logits += [model(ids[:, 6:7], **with_cache(model, cache)).logits]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole(model, ids, 1)[:, :6], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["span", "groups"])
@torch.no_grad()
def test_decoding_compiles_as_one_graph(kind, ids, tmp_path):
    """With a static cache, a decoding step has no graph break, and says the same compiled."""
    save_tiny("llama", tmp_path / "base")
    geometry = geometry_of_folder(tmp_path / "base")
    recipe = write_recipe(tmp_path / "recipe.json", make_map(kind, geometry))
    done = run_cli("convert", tmp_path / "base", "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
    assert done.returncode == 0, done.stderr
    model = load_converted(tmp_path / "out", dtype=torch.float32)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :8], **with_cache(model, cache))
    logits = [step(ids[:, at : at + 1], **with_cache(model, cache)).logits for at in range(8, 12)]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole(model, ids)[:, :4], atol=1e-4, rtol=1e-4)
