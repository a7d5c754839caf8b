"""torch.export with dynamic batch sizes and lengths: one graph for all, of every way in which layers share."""

import pytest
import torch
from torch.export import Dim, export

from sa_convert.families.table import FAMILIES
from support.converted_folder import convert_tiny

CASES = [
    ("llama", "groups"),
    ("llama", "heads"),
    ("qwen3", "heads"),
    ("gemma3_text", "heads"),
    ("gpt2", "heads"),
    ("gpt_neox", "span"),
    ("qwen2_moe", "heads"),  # loans beside positions
    ("falcon", "heads"),  # loans in a context variable
    ("bert", "heads"),
    ("t5", "heads"),
]


class Logits(torch.nn.Module):
    """A model from tokens, mask and, of an encoder-decoder, a decoder's tokens to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, decoder=None):
        extra = {} if decoder is None else {"decoder_input_ids": decoder}
        if self.model.can_generate():
            extra["use_cache"] = False
        return self.model(input_ids=ids, attention_mask=mask, **extra).logits


def inputs(batch, length, encoder_decoder):
    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return (ids, mask, *((ids[:, 3:].contiguous(),) if encoder_decoder else ()))


@pytest.mark.parametrize(
    ("family", "kind", "kernel"),
    [(*case, "sdpa") for case in CASES]
    + [("llama", "heads", "eager"), ("gpt2", "heads", "eager"), ("t5", "heads", "eager")],
    ids=lambda value: value,
)
@torch.no_grad()
def test_one_graph_for_all_shapes(tmp_path, family, kind, kernel):
    model = Logits(convert_tiny(tmp_path, family, kind).load(attn_implementation=kernel, dtype=torch.float32))
    both = FAMILIES[family].encoder_decoder
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=256)
    shapes = [{0: batch, 1: length}] * 2 + [{0: batch, 1: Dim("decoder", min=2, max=256)}] * both
    graph = export(model, inputs(2, 9, both), dynamic_shapes=tuple(shapes), strict=False).module()
    for size in ((2, 9), (3, 17), (5, 40)):
        given = inputs(*size, both)
        seen = slice(None) if both else given[1].bool()
        torch.testing.assert_close(graph(*given)[seen], model(*given)[seen], atol=1e-4, rtol=1e-4)
