"""What vLLM's Transformers backend asks of a model, played by a function that is registered under its name. The engine
itself runs in tests/ecosystem/test_vllm.py."""

import inspect

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from support.windowed_models import Pair

SPAN = {3: {group: {"share": [[2, 2 * group], [2, 2 * group + 1]]} for group in range(4)}}
SCATTERED = {3: {0: {"share": [[2, 2], [1, 5]]}}}


class Kernel(nn.Module):
    """The layer that vLLM attaches: causal attention over (T, heads * D)."""

    def __init__(self, heads, groups, size):
        super().__init__()
        self.num_heads, self.groups, self.size = heads, groups, size

    def forward(self, query, key, value):
        query = query.view(1, -1, self.num_heads, self.size).transpose(1, 2)
        key, value = (states.view(1, -1, self.groups, self.size).transpose(1, 2) for states in (key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).flatten(2)[0]


def vllm(module, query, key, value, attention_mask, **kwargs):
    flat = (states.transpose(1, 2).reshape(states.shape[-2], -1) for states in (query, key, value))
    return module.attn(*flat), None


@pytest.fixture(autouse=True)
def registered():
    AttentionInterface.register("vllm", vllm)


def test_same_logits_by_a_kernel_that_a_module_holds():
    pair = Pair("llama", {}, kernel="vllm", more=SPAN, groups=4)
    sdpa = Pair("llama", {}, kernel="sdpa", more=SPAN, groups=4)
    attentions = [layer.self_attn for layer in pair.model.model.layers]
    # Asked before and after it has the engine's layer, a module names the engine, and then our function.
    assert attentions[3].config._attn_implementation == "vllm"
    for attention in attentions:
        attention.attn = Kernel(8, 4, 16)
    assert attentions[3].config._attn_implementation == "shared_attention"
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        found = pair.model.model(ids, position_ids=torch.arange(20)[None], use_cache=False)
        expected = sdpa.model.model(ids, use_cache=False)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_the_source_of_a_forward_is_the_familys():
    """vLLM reads it for how scores are scaled."""
    pair = Pair("llama", {}, kernel="vllm", more=SPAN, groups=4)
    own = inspect.unwrap(type(pair.model.model.layers[3].self_attn).forward)
    assert own is inspect.unwrap(type(pair.base.model.layers[3].self_attn).forward)
    assert "ALL_ATTENTION_FUNCTIONS.get_interface" in inspect.getsource(own)


def test_heads_that_are_left_whole_in_every_rank_are_refused():
    """vLLM's layer of a rank has a part of them, and would read the rest as more tokens."""
    pair = Pair("llama", {}, kernel="vllm", more={3: {0: {"share": [[2, 2], [2, 3]]}}}, groups=4)
    for layer in pair.model.model.layers:
        layer.self_attn.attn = Kernel(4, 2, 16)
    with pytest.raises(ValueError, match="ranks cannot divide this plan: serve it without tensor"):
        pair.model.model(torch.arange(3, 23)[None], position_ids=torch.arange(20)[None], use_cache=False)


def test_windows_are_refused():
    with pytest.raises(ValueError, match="layer 0 has windows of its KV groups, and vLLM has one window for a layer"):
        Pair("llama", kernel="vllm")


def test_heads_of_one_kv_group_with_different_keys_are_refused():
    with pytest.raises(ValueError, match="heads of one KV group of layer 3 have different keys"):
        Pair("llama", {}, kernel="vllm", more=SCATTERED, groups=4)
