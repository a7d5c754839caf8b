"""Flex attention: the same tokens, and no more kernels than the base compiles for each layout of key heads."""

import pytest
import torch
from transformers.integrations import flex_attention

from support.memory_models import inputs, made

# Layouts of key heads in layers that share. In a group whose heads read different keys, every query gets its own key.
LAYOUTS = [("llama", 4, 2), ("qwen3", 8, 1), ("granite", 2, 2)]
MASKS = 3  # the base's, of a prompt, of one token, and of any length; as many kernels for every layout


@pytest.fixture
def uncompiled(monkeypatch):
    """Graphs are traced and counted as ever, and run as they are: no compiler is needed, and no time."""

    def set_up(self, training):
        self.training = training
        if not self._is_flex_compiled:
            self._is_flex_compiled = True
            self._compiled_flex_attention = torch.compile(flex_attention.flex_attention, backend="eager")

    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "__init__", set_up)
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "_instance", None)


@torch.no_grad()
def tokens_and_graphs(model):
    """Generated tokens of prompts of three lengths, and how many graphs that compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.set_attn_implementation("flex_attention")
    ids, found = inputs(model, 12)["input_ids"], []
    for length in (9, 12, 7):
        found.append(model.generate(ids[:, :length], max_new_tokens=6, do_sample=False, eos_token_id=None))
    counters = torch._dynamo.utils.counters
    assert not [reason for reason in counters["unimplemented"] if "limit exceeded" in reason]
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("model_type", "groups", "layouts"), LAYOUTS)
def test_kernels_and_tokens(model_type, groups, layouts, uncompiled):
    _, base = tokens_and_graphs(made(model_type, share=False, num_key_value_heads=groups))
    model = made(model_type, num_key_value_heads=groups)
    found, graphs = tokens_and_graphs(model)
    assert graphs <= MASKS + layouts * (base - MASKS)
    model.set_attn_implementation("sdpa")
    ids = inputs(model, 12)["input_ids"]
    for length, tokens in zip((9, 12, 7), found, strict=True):
        expected = model.generate(ids[:, :length], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(tokens, expected)
