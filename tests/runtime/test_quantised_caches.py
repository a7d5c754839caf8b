"""The library's quantised caches, by quanto and by HQQ, under everything that a plan does: the numbers that come of
rounding by hand, bytes as the plan has them, and as many groups as take fewest."""

import math

import pytest
import torch

from support.low_rank_models import convert
from support.rounded_by_hand import BITS, GROUP, ByHand, bytes_of, cache_options, made_by
from support.tiny_models import load_converted, with_cache

LENGTH, FIRST, NEW = 24, 7, 8
FAMILIES = {"llama": {}, "qwen3": {}, "gemma3_text": {"layer_types": ["full_attention"] * 6}}
WINDOWS = {0: {0: (2, 5), 2: (1, 4)}, 4: dict.fromkeys(range(4), (2, 5))}
KEYS, VALUES = {0: {1: 8}, 1: {0: 8, 1: 8, 3: 8}}, {0: {1: 8, 3: 8}, 1: {2: 8}}
BORROWED = {3: {head: (2, head) for head in range(8)}, 5: {0: (2, 1), 1: (2, 6)}}
"""All heads of a layer, which then caches no keys; and a KV group of another."""


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A converted model, and the reference."""
    more = {
        layer: {group: {"window": {"sinks": sinks, "tokens": tokens}} for group, (sinks, tokens) in told.items()}
        for layer, told in WINDOWS.items()
    }
    for layer, heads in BORROWED.items():
        for head in sorted(heads):
            more.setdefault(layer, {}).setdefault(head // 2, {"share": []})["share"].append(list(heads[head]))
    folder, whole = tmp_path_factory.mktemp(request.param), {6: "drop"}
    changes = {"num_hidden_layers": 7, **FAMILIES[request.param]}
    if "layer_types" in changes:
        changes["layer_types"] = ["full_attention"] * 7
    found = convert(folder, request.param, KEYS, more, VALUES, whole, **changes)
    return load_converted(found.folder, dtype=torch.float32), ByHand(found, WINDOWS, BORROWED, {6})


@pytest.fixture
def ids():
    return torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def stepwise(model, ids, cache, cuts=(FIRST, 13, *range(14, LENGTH + 1))):
    """Logits of all tokens, so many at a time."""
    found, start = [], 0
    for stop in cuts:
        found.append(model(ids[:, start:stop], **with_cache(model, cache)).logits)
        start = stop
    return torch.cat(found, dim=1)


@torch.no_grad()
def greedy(model, ids, cache):
    """Tokens that follow, one by one."""
    found, now = [], ids
    for _ in range(NEW):
        now = model(now, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        found.append(now)
    return torch.cat(found, dim=1)


def error(found, expected):
    return (found - expected).abs().mean().item()


@pytest.mark.parametrize("backend", BITS)
def test_it_is_what_rounding_by_hand_gives(case, ids, backend):
    """quanto rounds by the formula. HQQ moves the shift of each group a little, by an optimum of its own."""
    model, reference = case
    cache = made_by(backend, model)
    found = stepwise(model, ids, cache)
    assert cache.get_seq_length() == LENGTH
    with reference.open() as base:
        exact, expected = (stepwise(base, ids, reference.cache(bits)) for bits in (None, BITS[backend]))
    rounding = error(expected, exact)
    if backend == "quanto":  # a number between two grid points may go either way
        assert error(found, expected) < 0.03 * rounding
    assert rounding / 3 < error(found, exact) < 2 * rounding


@pytest.mark.parametrize("backend", BITS)
def test_tokens_of_generate(case, ids, backend):
    """Beyond the windows, with a cache that `generate` makes; and the same tokens with one given."""
    model, reference = case
    given = made_by(backend, model)
    with reference.open() as base:
        expected = greedy(base, ids, reference.cache(BITS[backend]))
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    asked = {"backend": backend, **cache_options(backend)}
    found = model.generate(ids, cache_implementation="quantized", cache_config=asked, **options)
    assert torch.equal(found[:, LENGTH:], expected)
    assert torch.equal(model.generate(ids, past_key_values=given, **options)[:, LENGTH:], expected)


@pytest.mark.parametrize("backend", BITS)
def test_bytes_are_those_of_the_plan(case, ids, backend):
    """Of each token, half a byte or a byte for each number that the plan keeps, and two scales for each group of
    them. Windows are not rounded, and no longer than they are."""
    model, _ = case
    cache = made_by(backend, model)
    stepwise(model, ids, cache, (FIRST, LENGTH))
    numbers = {0: (8 + 16) + (8 + 8), 1: (3 * 8 + 16) + (8 + 3 * 16), 2: 8 * 16, 3: 4 * 16, 5: 7 * 16}  # keys, values
    each = BITS[backend] / 8 + 2 * 4 / GROUP
    for number, count in numbers.items():
        assert bytes_of(cache.layers[number]) == LENGTH * count * each, number
    assert cache.layers[4].nbytes == 4 * 7 * 2 * 16 * 4
    assert cache.layers[6].keys is None


class Layered:
    def __init__(self, bits, size):
        self.nbits, self.q_group_size = bits, size


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_take_the_fewest_bytes(bits, dtype):
    """Against all sizes of groups; whatever a token caches, they end where it does, as quantisers need it."""
    from sa_convert.runtime.modeling_shared_attention import in_groups

    def cost(shapes, size):
        total = 0
        for heads, width in shapes:
            filled = width if heads * width % size == 0 else math.ceil(width / size) * size
            total += heads * filled * bits + heads * filled / size * 16 * dtype.itemsize
        return total

    for shapes in ([(3, 64), (3, 64)], [(1, 104), (3, 64)], [(1, 33), (1, 24)], [(1, 40), (1, 72)], [(4, 24), (2, 8)]):
        layer = Layered(bits, 64)
        slots = [torch.ones(1, heads, 5, width, dtype=dtype) for heads, width in shapes]
        for _ in range(2):
            made = in_groups(layer, slots)
            size = layer.q_group_size
            assert all(each.shape[1] * each.shape[-1] % size == 0 for each in made)
            taken = sum(each[0, :, 0].numel() * (bits + 16 * dtype.itemsize / size) for each in made)
            assert taken == min(cost(shapes, 64 >> halved) for halved in range(7))
            for each, slot in zip(made, slots, strict=True):
                assert torch.equal(each[..., : slot.shape[-1]], slot)
                assert not each[..., slot.shape[-1] :].any()
