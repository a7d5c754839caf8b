"""Windows under kernels other than eager attention and SDPA: these compute what is left, SDPA computes the windows."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flex_attention
from transformers.masking_utils import flash_attention_mask

from support.memory_models import some_ids
from support.windowed_models import EVERY, MIXED, Pair, in_pieces, positions

LENGTH = 30
CUTS = {"whole": [30], "many": [3, 5, 6, 13, 28, 30], "prompt": [21, *range(22, 31)]}
# Windows of their own, softcaps and sinks, which are kernels' business, too.
TYPES = ("llama", "gemma3_text", "gemma2", "gpt_oss")
CASES = [(name, kernel) for name in TYPES for kernel in ("flex_attention", "flash_stand_in")]
CASES.remove(("gpt_oss", "flex_attention"))  # transformers refuses sinks with flex attention on a CPU


def _flash(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs):
    """Stands in for flash attention: it takes which tokens are real (B, S), or None, and its window as an argument."""
    assert attention_mask is None or attention_mask.ndim == 2
    tokens, length = query.shape[-2], key.shape[-2]
    place, seen = torch.arange(length - tokens, length)[:, None], torch.arange(length)[None]
    allowed = (seen <= place)[None]
    if sliding_window is not None:
        allowed = allowed & (place - seen < sliding_window)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, -length:].bool()
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    scores = query @ key.transpose(-2, -1) * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~allowed[:, None], torch.finfo(scores.dtype).min)
    if kwargs.get("s_aux") is not None:
        sinks = kwargs["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return (scores.softmax(dim=-1)[..., :length] @ value).transpose(1, 2), None


AttentionInterface.register("flash_stand_in", _flash)
AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)


@pytest.fixture
def uncompiled(monkeypatch):
    """Flex attention, as it is: neither traced nor compiled."""

    def set_up(self, training):
        self.training, self._is_flex_compiled = training, True
        self._compiled_flex_attention = flex_attention.flex_attention

    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "__init__", set_up)
    monkeypatch.setattr(flex_attention.WrappedFlexAttention, "_instance", None)


def paired(model_type, plan, kernel):
    pair = Pair(model_type, plan, kernel="eager")
    pair.model.config._attn_implementation = kernel
    return pair


@pytest.mark.parametrize("plan", [MIXED, EVERY], ids=["mixed", "every"])
@pytest.mark.parametrize(("model_type", "kernel"), CASES)
@torch.no_grad()
def test_kernels(model_type, plan, kernel, uncompiled):
    pair, ids = paired(model_type, plan, kernel), some_ids(LENGTH)
    expected = pair.expected(ids)
    torch.testing.assert_close(pair.model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    for cuts in CUTS.values():
        found, _ = in_pieces(pair.model, ids, cuts)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_stand_in"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(side, kernel, uncompiled):
    pair, ids, mask = paired("gemma3_text", MIXED, kernel), some_ids(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, 9) if side == "left" else slice(LENGTH - 9, None)] = 0
    expected, real = pair.expected(ids, mask, position_ids=positions(mask)), mask.bool()
    found = pair.model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    for cuts in CUTS.values():
        found, _ = in_pieces(pair.model, ids, cuts, mask)
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
