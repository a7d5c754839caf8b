"""Files of models with low-rank keys: what shrinks, by how much, and what stays the same bytes."""

import pytest
import torch

from sa_convert.plan.converted import converted_parts
from sa_convert.read.open_model import open_model
from support.low_rank_models import convert, tensors_of

RANKS = {1: {0: 5, 1: 4}, 2: {0: 6, 1: 6, 2: 6, 3: 6}}
HIDDEN, SIZE = 64, 16


def test_projections_of_keys_have_a_row_for_each_number_that_is_cached(tmp_path):
    found = convert(tmp_path, "llama", RANKS)
    before, after = tensors_of(tmp_path / "base"), tensors_of(found.folder)
    for layer, rows, rank, groups in ((1, 2 * SIZE + 9, 9, 2), (2, 24, 24, 4)):
        start = f"model.layers.{layer}.self_attn."
        assert f"{start}k_proj.weight" not in after
        assert after[f"{start}k_proj.down.weight"].shape == (rows, HIDDEN)
        assert after[f"{start}k_proj.down.bias"].shape == (rows,)
        assert after[f"{start}low_rank.basis"].shape == (rank, SIZE)
        assert after[f"{start}low_rank.offset"].shape == (groups, SIZE)
    # Full groups keep their rows, and come first.
    kept = before["model.layers.1.self_attn.k_proj.weight"][2 * SIZE :]
    assert torch.equal(after["model.layers.1.self_attn.k_proj.down.weight"][: 2 * SIZE], kept)
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    # As was said before anything was written.
    savings = found.conversion.savings
    assert savings.parameters.after == sum(tensor.numel() for tensor in after.values())
    assert savings.parameters.after < savings.parameters.before


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "olmo"])
def test_keys_that_more_than_a_projection_makes_keep_it(family, tmp_path):
    found = convert(tmp_path, family, {1: {0: 5}})
    before, after = tensors_of(tmp_path / "base"), tensors_of(found.folder)
    assert before.keys() <= after.keys()
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"basis", "offset", "encoder"}


def test_a_model_all_of_whose_layers_are_treated_is_read(tmp_path):
    every = {layer: dict.fromkeys(range(4), 8) for layer in range(6)}
    found = convert(tmp_path, "llama", every)
    model, plan = converted_parts(open_model(str(found.folder)))
    assert model.geometry == found.model.geometry
    assert plan.group_count("low_rank") == 24


def test_beside_groups_that_borrow(tmp_path):
    """A layer has groups with low-rank keys, groups without keys, and full ones."""
    more = {2: {3: {"share": [[0, 0], [0, 1]]}}}
    found = convert(tmp_path, "llama", {2: {0: 5}}, more)
    after = tensors_of(found.folder)
    start = "model.layers.2.self_attn."
    assert after[f"{start}k_proj.down.weight"].shape == (2 * SIZE + 5, HIDDEN)
    assert after[f"{start}q_proj.weight"].shape == (6 * SIZE, HIDDEN)
