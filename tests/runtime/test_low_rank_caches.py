"""Low-rank keys and values in every kind of cache: positions of cached tokens are told by each call."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from support.low_rank_models import convert, projected, projected_logits
from support.tiny_models import load_converted, with_cache

RANKS = {0: {0: 8, 2: 8}, 1: {0: 6, 1: 9}, 3: {0: 8, 1: 8, 2: 8, 3: 8}}
VALUES = {0: {2: 5}, 1: {0: 6, 3: 7}, 4: {0: 6, 1: 6, 2: 6, 3: 6}}
FAMILIES = ("llama", "gemma2", "qwen3")
LENGTH = 20
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    found = convert(tmp_path_factory.mktemp(request.param), request.param, RANKS, values=VALUES)
    return found, load_converted(found.folder, dtype=torch.float32)


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def stepwise(model, ids, cache, chunks=(8, *[1] * (LENGTH - 8)), **told):
    """Logits of all tokens, so many at a time. told: tensors of which each pass gets what is there so far, or (names
    that begin with "position") what is new."""
    found, start = [], 0
    for count in chunks:
        stop = start + count
        now = {
            name: value[:, start:stop] if name.startswith("position") else value[:, :stop]
            for name, value in told.items()
        }
        found.append(model(ids[:, start:stop], **with_cache(model, cache), **now).logits)
        start = stop
    return torch.cat(found, dim=1)


def padded(side, pads=3):
    """A mask whose first row has padding on one side, or in the middle, and positions that leave it out."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    start = {"left": 0, "middle": 6}[side]
    mask[0, start : start + pads] = 0
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("chunks", [(20,), (8, *[1] * 12), (7, 6, 7), (1, 9, 1, 9)], ids=str)
def test_in_chunks(case, ids, chunks):
    found, model = case
    wanted = projected_logits(found, ids)
    torch.testing.assert_close(stepwise(model, ids, DynamicCache(config=model.config), chunks), wanted, **CLOSE)


@pytest.mark.parametrize("side", ["left", "middle"])
@pytest.mark.parametrize("told", [True, False])
def test_padding(case, ids, side, told):
    """In the middle there is padding if a batch that was padded on the right goes on."""
    found, model = case
    mask, positions = padded(side)
    wanted = projected_logits(found, ids, mask, positions if told else None)
    given = {"position_ids": positions} if told else {}
    for chunks in ((20,), (10, *[1] * 10), (5, 10, 5)):
        made = stepwise(model, ids, DynamicCache(config=model.config), chunks, attention_mask=mask, **given)
        torch.testing.assert_close(made[mask.bool()], wanted[mask.bool()], **CLOSE)


def test_positions_that_begin_elsewhere(case, ids):
    found, model = case
    positions = torch.arange(LENGTH)[None] + torch.tensor([[5], [40]])
    wanted = projected_logits(found, ids, positions=positions)
    made = stepwise(model, ids, DynamicCache(config=model.config), position_ids=positions)
    torch.testing.assert_close(made, wanted, **CLOSE)


def test_a_static_cache(case, ids):
    found, model = case
    cache = StaticCache(config=model.config, max_cache_len=32)
    torch.testing.assert_close(stepwise(model, ids, cache), projected_logits(found, ids), **CLOSE)
    for number, layer in enumerate(cache.layers):
        ranks = RANKS.get(number)
        size = found.bases.size
        assert layer.keys.shape[1] * layer.keys.shape[-1] == (
            4 * size if ranks is None else (4 - len(ranks)) * size + sum(ranks.values())
        )
        values = VALUES.get(number, {})
        assert layer.values.shape[1] * layer.values.shape[-1] == (4 - len(values)) * size + sum(values.values())


class Rounded(QuantizedLayer):
    """Keeps states as bytes."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax().clamp(min=1e-6) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        return quantized[0].float() * quantized[1]


def test_a_quantised_cache(case, ids):
    """It holds numbers of low-rank keys, whose positions are not among them."""
    found, model = case
    cache = Cache(layers=[Rounded(residual_length=3) for _ in range(6)])
    made, wanted = stepwise(model, ids, cache), projected_logits(found, ids)
    assert (made - wanted).abs().max() < 0.05 * wanted.abs().max()
    width = cache.layers[3]._quantized_keys[0].shape
    assert width[1] * width[-1] == sum(RANKS[3].values())


@torch.no_grad()
def test_full_graphs_of_steps_in_a_static_cache(case, ids):
    found, model = case
    cache = StaticCache(config=model.config, max_cache_len=32)
    mask, positions = padded("left")
    wanted = projected_logits(found, ids, mask, positions)

    def given(start, stop):
        return {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop], **with_cache(model, cache)}

    model(ids[:, :8], **given(0, 8))
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=True)
    for at in range(8, 12):
        made = step(ids[:, at : at + 1], **given(at, at + 1)).logits
        torch.testing.assert_close(made[:, 0], wanted[:, at], **CLOSE)


def test_generation_from_padded_prompts(case, ids):
    """With every cache that generate() makes: greedy, in beams, and assisted by a model that is often wrong."""
    found, model = case
    mask, _ = padded("left")
    ids = ids.masked_fill(mask == 0, 0)
    found.base.set_attn_implementation("eager")
    for options in ({}, {"num_beams": 3}):
        asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **options}
        with torch.no_grad(), projected(found):
            wanted = found.base.generate(ids, use_cache=False, **asked)
        for kind in (None, "static"):
            told = {} if kind is None else {"cache_implementation": kind}
            assert torch.equal(model.generate(ids, **asked, **told), wanted), (kind, options)


def test_assisted_generation_takes_tokens_back(case, ids):
    found, model = case
    with torch.no_grad(), projected(found):
        wanted = found.base.generate(ids[:1], max_new_tokens=12, do_sample=False, use_cache=False)
    helper = copy.deepcopy(found.base)
    made = model.generate(ids[:1], max_new_tokens=12, do_sample=False, assistant_model=helper)
    assert torch.equal(made, wanted)


@torch.no_grad()
def test_a_cropped_and_a_copied_cache_go_on(case, ids):
    found, model = case
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], **with_cache(model, cache))
    kept = copy.deepcopy(cache)
    model(ids[:, 8:11].flip(1), **with_cache(model, cache))
    if not any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        cache.crop(-3)
        found_crop = model(ids[:, 8:], **with_cache(model, cache)).logits
        torch.testing.assert_close(found_crop, projected_logits(found, ids)[:, 8:], **CLOSE)
    made = model(ids[:, 8:], **with_cache(model, kept)).logits
    torch.testing.assert_close(made, projected_logits(found, ids)[:, 8:], **CLOSE)


@torch.no_grad()
def test_rows_of_a_cache_are_chosen(case, ids):
    found, model = case
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], **with_cache(model, cache))
    cache.reorder_cache(torch.tensor([1, 1]))
    made = model(ids[[0, 0], 8:], **with_cache(model, cache)).logits
    wanted = projected_logits(found, torch.cat([ids[[1, 1], :8], ids[[0, 0], 8:]], dim=1))[:, 8:]
    torch.testing.assert_close(made, wanted, **CLOSE)


def test_gradients_reach_bases_and_projections(case, ids):
    _, model = case

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if "low_rank" in name}

    model.train()
    plain = gradients()
    assert plain
    assert all(bool(grad.abs().sum() > 0) for grad in plain.values())
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    for name, grad in checkpointed.items():
        torch.testing.assert_close(grad, plain[name])


def test_another_models_cache_is_refused(case, ids):
    found, model = case
    cache = DynamicCache(config=found.base.config)
    found.base(ids[:, :8], **with_cache(found.base, cache))
    with pytest.raises((ValueError, RuntimeError), match="another model"):
        model(ids[:, 8:9], **with_cache(model, cache))
