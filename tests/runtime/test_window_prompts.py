"""Prompts of several blocks of queries, and the tokens after them, against masked scores of the base: windows shorter
and longer than a block, in one piece and in two, with and without padding and a window of the family's own."""

import pytest
import torch

from sa_convert.treatments.window.runtime import BLOCK, WindowPass
from support.memory_models import some_ids
from support.windowed_models import Pair, in_pieces, positions

LENGTH = 3 * BLOCK + 50
PLAN = {
    0: {0: (4, 20), 1: (4, BLOCK), 2: (0, BLOCK + 70)},
    2: dict.fromkeys(range(4), (4, 2 * BLOCK + 30)),
    3: {0: (4, 20), 3: (4, 2 * BLOCK + 30)},
    4: dict.fromkeys(range(4), (3, LENGTH)),  # never outgrown
}


def first_rows_padded():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, : BLOCK + 9] = 0
    return mask


@pytest.mark.parametrize("cuts", [[LENGTH - 2], [BLOCK + 30, LENGTH - 2]], ids=["one piece", "two pieces"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(("model_type", "kernel"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")])
@torch.no_grad()
def test_prompts_of_several_blocks(model_type, kernel, padded, cuts):
    pair = Pair(model_type, PLAN, kernel, **({"sliding_window": 2 * BLOCK} if model_type == "mistral" else {}))
    ids, mask = some_ids(LENGTH), first_rows_padded() if padded else None
    told = {} if mask is None else {"position_ids": positions(mask)}
    expected, real = pair.expected(ids, mask, **told), slice(None) if mask is None else mask.bool()
    found, _ = in_pieces(pair.model, ids, [*cuts, LENGTH - 1, LENGTH], mask)
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    uncached = pair.model(ids, attention_mask=mask, use_cache=False, **told).logits
    torch.testing.assert_close(uncached[real], expected[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_blocks_that_are_alike_have_one_mask(monkeypatch):
    """In all layers of a pass, and none where nothing has left the window: what makes prompts faster."""
    made, additive = [], WindowPass.additive

    def counted(self, query, begin, end, *args):
        made.append((begin, end))
        return additive(self, query, begin, end, *args)

    monkeypatch.setattr(WindowPass, "additive", counted)
    every = {layer: dict.fromkeys(range(4), (4, BLOCK)) for layer in range(6)}
    pair, ids = Pair("llama", every), some_ids(3 * BLOCK + 4)
    found = pair.model(ids, use_cache=False).logits
    assert made == [(BLOCK + 4, 2 * BLOCK + 4)]  # the next block is like it, and the first needs none
    torch.testing.assert_close(found, pair.expected(ids), atol=1e-4, rtol=1e-4)
