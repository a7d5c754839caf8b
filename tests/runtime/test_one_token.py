"""One token without a mask goes straight to SDPA's kernel, unless transformers' function is told what counts."""

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sa_convert.runtime.modeling_shared_attention import Call
from support.memory_models import some_ids
from support.tiny_models import with_cache
from support.windowed_models import MIXED, Pair

HARMLESS = {"dropout": 0.0, "scaling": 0.3, "use_cache": True, "softcap": None, "output_attentions": False}


@pytest.fixture
def call():
    attention = Pair("llama", MIXED).model.model.layers[0].self_attn
    return lambda **arguments: Call(attention, "sdpa", None, arguments)


@pytest.fixture
def states():
    """A query (2, 8, 1, 16), and keys and values (2, 4, 9, 16)."""
    torch.manual_seed(0)
    return torch.randn(2, 8, 1, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)


@pytest.fixture
def asked(monkeypatch):
    """How often transformers' function was."""
    function, times = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    counted = lambda *args, **kwargs: times.append(1) or function(*args, **kwargs)  # noqa: E731
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    return times


def by_hand(query, key, value, scale):
    """(B, 1, H, D): softmax of scaled products, head by head."""
    rows = [
        torch.softmax(query[:, head] @ key[:, head // 2].mT * scale, dim=-1) @ value[:, head // 2] for head in range(8)
    ]
    return torch.stack(rows, dim=2)


def test_what_it_computes(call, states, asked):
    output, weights = call(**HARMLESS).kernel(*states, None)
    torch.testing.assert_close(output, by_hand(*states, 0.3))
    assert weights is None
    assert not asked


def test_no_scale_is_that_of_the_size_of_a_head(call, states):
    torch.testing.assert_close(call().kernel(*states, None)[0], by_hand(*states, 0.25))


@pytest.mark.parametrize("told", [{"dropout": 0.5}, {"anything_new": torch.ones(1)}, {"anything_new": 2.0}], ids=str)
def test_whatever_counts_is_transformers_to_see(call, states, asked, told):
    call(**{**HARMLESS, **told}).kernel(*states, None)
    assert asked == [1]


def test_two_tokens_and_masks_are_as_well(call, states, asked):
    query, key, value = states
    call(**HARMLESS).kernel(query, key, value, torch.ones(2, 1, 1, 9, dtype=torch.bool))
    call(**HARMLESS).kernel(query.expand(-1, -1, 2, -1), key, value, None)
    assert asked == [1, 1]


@torch.no_grad()
def test_steps_of_a_model_do_not_pass_it(asked):
    model = Pair("llama", MIXED).model
    cache = with_cache(model, DynamicCache(config=model.config))
    model(some_ids(20), **cache)  # longer than any window
    del asked[:]
    for token in some_ids(8).split(1, dim=1):
        model(token, **cache)
    treated = sum(hasattr(layer.self_attn, "plan") for layer in model.model.layers)
    assert len(asked) == 8 * (len(model.model.layers) - treated)
