"""Windows in every kind of cache, and whatever is done to one; what a cache holds of them."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from support.forced_attention import forced_attention
from support.memory_models import some_ids
from support.tiny_models import with_cache
from support.windowed_models import EVERY, MIXED, Pair, in_pieces

LENGTH = 30
CUTS = {"whole": [30], "many": [3, 5, 6, 7, 8, 13, 14, 15, 28, 29, 30], "prompt": [21, *range(22, 31)]}
PLANS = {"mixed": MIXED, "every": EVERY}


class Grouped(QuantizedLayer):
    """Keeps numbers as they are; as real quantisers do, it refuses a tensor without elements."""

    def _quantize(self, tensor, axis):
        if not tensor.numel():
            raise ValueError("nothing to quantise")
        return tensor

    def _dequantize(self, quantized):
        return quantized


def made_beforehand(model):
    """A static cache whose slots have the base's shape before the model writes to them."""
    cache, config = StaticCache(config=model.config, max_cache_len=40), model.config
    shape = {"batch_size": 2, "num_heads": config.num_key_value_heads, "head_dim": config.head_dim}
    cache.early_initialization(**shape, dtype=torch.float32, device=torch.device("cpu"))
    return cache


CACHES = {
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
    "quantised": lambda model: Cache(
        layers=[Grouped(residual_length=3) for _ in range(model.config.num_hidden_layers)]
    ),
}


@pytest.fixture(scope="module", params=PLANS)
def pair(request):
    return Pair("llama", PLANS[request.param])


@torch.no_grad()
def continued(pair, cache, ids, start):
    """Logits of the tokens from `start` on, one by one."""
    steps = [
        pair.model(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits for at in range(start, ids.shape[1])
    ]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("make", [*CACHES.values(), made_beforehand], ids=[*CACHES, "made beforehand"])
def test_kinds(pair, make, cuts):
    ids = some_ids(LENGTH)
    found, _ = in_pieces(pair.model, ids, CUTS[cuts], cache=make(pair.model))
    torch.testing.assert_close(found, pair.expected(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [False, True], ids=["steps", "chunk"])
@pytest.mark.parametrize(("first", "more"), [(20, 5), (3, 10)])
def test_tokens_are_taken_back(pair, first, more, chunk):
    ids = some_ids(LENGTH)
    others = torch.cat([ids[:, :first], ids.flip(0)[:, first : first + more]], dim=1)
    cuts = [first, first + more] if chunk else [first, *range(first + 1, first + more + 1)]
    _, cache = in_pieces(pair.model, others, cuts)
    cache.crop(-more)
    torch.testing.assert_close(continued(pair, cache, ids, first), pair.expected(ids)[:, first:], atol=1e-4, rtol=1e-4)


def test_what_is_gone_is_not_taken_back(pair):
    ids = some_ids(80)
    _, cache = in_pieces(pair.model, ids, [20, *range(21, 81)])
    with pytest.raises(ValueError, match=r"^shared_attention: 50 of 80 tokens cannot be taken back"):
        cache.crop(-50)


@torch.no_grad()
def test_rows(pair):
    ids = some_ids(LENGTH)
    expected, last = pair.expected(ids)[:, 20:], ids[:, 20:]
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        _, cache = in_pieces(pair.model, ids[:, :20], [7, 20])
        change(cache)
        found = pair.model(last[rows], **with_cache(pair.model, cache)).logits
        torch.testing.assert_close(found, expected[rows], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_caches_that_part_do_not_write_into_each_other(pair):
    ids = some_ids(LENGTH)
    others = torch.cat([ids[:, :20], ids.flip(0)[:, 20:]], dim=1)
    _, cache = in_pieces(pair.model, ids[:, :20], [12, *range(13, 21)])
    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    branches, found = [cache, shallow, copy.deepcopy(cache)], [[], [], []]
    for at in range(20, LENGTH):
        for index, branch in enumerate(branches):
            text = others if index == 1 else ids
            found[index].append(pair.model(text[:, at : at + 1], **with_cache(pair.model, branch)).logits)
    for index, logits in enumerate(found):
        wanted = pair.expected(others if index == 1 else ids)[:, 20:]
        torch.testing.assert_close(torch.cat(logits, dim=1), wanted, atol=1e-4, rtol=1e-4)


def test_a_cache_goes_through_inference_mode_and_gradients(pair):
    ids, cache, found = some_ids(LENGTH), DynamicCache(config=pair.model.config), []
    for mode, start, stop in ((torch.inference_mode, 0, 20), (torch.no_grad, 20, 25), (torch.enable_grad, 25, 30)):
        with mode():
            for at in range(start, stop):
                found.append(pair.model(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reset(pair, kind):
    ids = some_ids(LENGTH)
    cache = DynamicCache(config=pair.model.config) if kind == "dynamic" else CACHES[kind](pair.model)
    in_pieces(pair.model, ids.flip(0), CUTS["prompt"], cache=cache)
    cache.reset()
    found, _ = in_pieces(pair.model, ids, CUTS["many"], cache=cache)
    torch.testing.assert_close(found, pair.expected(ids), atol=1e-4, rtol=1e-4)


def test_assisted_generation(pair):
    ids = some_ids(LENGTH)[:1]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    expected = pair.model.generate(ids, **options)
    for helped in ({"assistant_model": pair.model}, {"prompt_lookup_num_tokens": 6}):
        assert torch.equal(pair.model.generate(ids, **options, **helped), expected)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_beside_shared_attention(kernel):
    """Windows in layers that lend and borrow, and sources whose numbers change as windows take KV groups out."""
    plan = {0: {0: (2, 4), 2: (1, 6)}, 2: {0: (2, 5), 2: (2, 6)}, 3: {1: (0, 3)}}
    rows = {
        2: [None, None, (0, 7), (0, 6), None, None, None, (1, 2)],
        4: [(1, 5), (2, 6), (0, 2), (0, 3), (1, 0), (1, 1), (1, 0), (1, 1)],
    }
    more = {
        2: {1: {"share": [[0, 7], [0, 6]]}, 3: {"share": [None, [1, 2]]}},
        4: {group: {"share": [list(rows[4][2 * group]), list(rows[4][2 * group + 1])]} for group in range(4)},
    }
    pair, ids = Pair("llama", plan, kernel, more=more), some_ids(LENGTH)
    with forced_attention(pair.base, rows):
        expected = pair.expected(ids)
    torch.testing.assert_close(pair.model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    for cuts in CUTS.values():
        for made in (*CACHES.values(), lambda model: DynamicCache(config=model.config)):
            found, _ = in_pieces(pair.model, ids, cuts, cache=made(pair.model))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_held():
    """Bytes that the next token needs: S + W tokens of windowed groups, however many have come."""
    pair, token = Pair("llama", EVERY), 2 * 16 * 4
    for length in (5, 7, 8, 60):
        _, cache = in_pieces(pair.model, some_ids(length)[:1], [length])
        assert [layer.nbytes for layer in cache.layers] == [4 * min(length, 7) * token] * 6
        if length <= 7:  # nothing is kept beside what the layer holds
            assert not any(layer.parts for layer in cache.layers)
            continue
        kept = cache.layers[0].parts["window"].kept.values()
        held = sum(states.nbytes for part in kept for states in (part.keys, part.values))
        assert 4 * 7 * token <= held <= 4 * (7 + 32) * token
    _, cache = in_pieces(Pair("llama", MIXED).model, some_ids(60)[:1], [50, *range(51, 61)])
    assert cache.layers[0].nbytes == (6 + 7 + 2 * 60) * token


def test_pages_without_a_mask_are_refused(pair):
    class PagedCache(DynamicCache):
        pass

    ids = some_ids(9)
    with pytest.raises(NotImplementedError, match="need a mask in continuous batching"):
        in_pieces(pair.model, ids, [9], cache=PagedCache())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(pair, checkpointing):
    """Those of the base under the plan."""
    ids = some_ids(LENGTH)
    pair.model.train()
    if checkpointing:
        pair.model.gradient_checkpointing_enable()
    try:
        pair.model.zero_grad()
        pair.model(ids, labels=ids, use_cache=False).loss.backward()
    finally:
        pair.model.gradient_checkpointing_disable()
        pair.model.eval()
    pair.base.zero_grad()
    with pair.forced():
        pair.base(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(pair.base.named_parameters())
    for name, parameter in pair.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_decoding_compiles_as_one_graph(plan):
    pair, ids = Pair("llama", PLANS[plan]), some_ids(LENGTH)
    torch._dynamo.reset()
    step, cache = torch.compile(pair.model.forward, fullgraph=True, backend="aot_eager"), CACHES["static"](pair.model)
    pair.model(ids[:, :10], **with_cache(pair.model, cache))
    found = [step(ids[:, at : at + 1], **with_cache(pair.model, cache)).logits for at in range(10, LENGTH)]
    torch.testing.assert_close(torch.cat(found, dim=1), pair.expected(ids)[:, 10:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_changes_nothing_costs_nothing(monkeypatch):
    """Up to the shortest window no code of windows runs; one token after that makes no mask and no block."""

    def never(*args, **kwargs):
        raise AssertionError("code of windows ran")

    pair, ids = Pair("llama", EVERY), some_ids(LENGTH)
    with monkeypatch.context() as patch:
        patch.setattr("sa_convert.treatments.window.runtime.Window.attend", never)
        found, cache = in_pieces(pair.model, ids[:, :7], [4, 6, 7])
    torch.testing.assert_close(found, pair.expected(ids[:, :7]), atol=1e-4, rtol=1e-4)
    pair.model(ids[:, 7:9], **with_cache(pair.model, cache))
    monkeypatch.setattr("sa_convert.treatments.window.runtime.WindowPass.attend", never)
    torch.testing.assert_close(continued(pair, cache, ids, 9), pair.expected(ids)[:, 9:], atol=1e-4, rtol=1e-4)
