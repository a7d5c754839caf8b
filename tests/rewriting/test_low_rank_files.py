"""Files of models with low-rank keys and values: what shrinks, by how much, and what stays the same bytes."""

import pytest
import torch

from sa_convert.plan.converted import converted_parts
from sa_convert.plan.savings import cache_at
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


VALUES = {1: {0: 5, 1: 4}, 3: {0: 6, 1: 6, 2: 6, 3: 6}}


def shapes(found, layer, start="model.layers.{}.self_attn."):
    """Of the tensors of a layer's attention."""
    start = start.format(layer)
    return {name.removeprefix(start): tuple(t.shape) for name, t in found.items() if name.startswith(start)}


def test_projections_of_values_and_outputs_are_narrower(tmp_path):
    found = convert(tmp_path, "llama", {}, values=VALUES)
    before, after = tensors_of(tmp_path / "base"), tensors_of(found.folder)
    for layer, rows in ((1, 2 * SIZE + 9), (3, 24)):
        told = shapes(after, layer)
        assert told["v_proj.down.weight"] == (rows, HIDDEN)
        assert told["v_proj.down.bias"] == (rows,)
        assert told["o_proj.up.weight"] == (HIDDEN, 2 * rows)  # two heads read each value
        assert told["o_proj.up.bias"] == (HIDDEN,)
        assert not {"v_proj.weight", "o_proj.weight"} & set(told)
        assert not [name for name in told if "low_rank" in name]
    # Full groups keep their rows and columns, at their places.
    kept = before["model.layers.1.self_attn.v_proj.weight"][2 * SIZE :]
    assert torch.equal(after["model.layers.1.self_attn.v_proj.down.weight"][9:], kept)
    kept = before["model.layers.1.self_attn.o_proj.weight"][:, 4 * SIZE :]
    assert torch.equal(after["model.layers.1.self_attn.o_proj.up.weight"][:, 18:], kept)
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    savings = found.conversion.savings
    assert savings.parameters.after == sum(tensor.numel() for tensor in after.values())
    assert savings.checkpoint_bytes.after == sum(tensor.nbytes for tensor in after.values())
    assert savings.checkpoint_bytes.after < savings.checkpoint_bytes.before


def test_fused_projections_are_narrower(tmp_path):
    found = convert(tmp_path, "phi3", {}, values=VALUES)
    told = shapes(tensors_of(found.folder), 1)  # heads of 8 numbers
    assert told["qkv_proj.down.weight"] == (8 * 8 + 4 * 8 + 2 * 8 + 9, HIDDEN)
    assert told["o_proj.up.weight"] == (HIDDEN, 4 * 8 + 18)


def test_queries_and_keys_that_are_not_turned_are_narrower(tmp_path):
    found = convert(tmp_path, "gpt2", {1: {0: 5, 3: 3}}, values={1: {1: 4}})  # heads of 8 numbers
    told = shapes(tensors_of(found.folder), 1, "transformer.h.{}.attn.")
    assert told["c_attn.down.weight"] == (2 * (6 * 8 + 5 + 3) + 7 * 8 + 4, HIDDEN)
    assert told["c_attn.down.bias"] == (2 * (6 * 8 + 5 + 3) + 7 * 8 + 4,)
    assert told["c_proj.up.weight"] == (HIDDEN, 7 * 8 + 4)
    assert not [name for name in told if "low_rank" in name]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bart"])
def test_a_model_all_of_whose_layers_are_treated_is_read(family, tmp_path):
    groups, layers = {"gpt2": 8, "opt": 8, "bart": 8}.get(family, 4), range(6)
    if family == "bart":
        layers = range(6, 10)  # its decoder
    every = {layer: dict.fromkeys(range(groups), 6) for layer in layers}
    found = convert(tmp_path, family, every, values=every)
    model, plan = converted_parts(open_model(str(found.folder)))
    assert model.geometry == found.model.geometry
    assert plan.group_count("low_rank") == groups * len(layers)
    assert cache_at(model, plan, 100) == cache_at(found.model, found.conversion.plan, 100)


def test_beside_groups_that_borrow(tmp_path):
    """A layer has groups with low-rank keys, groups without keys, and full ones."""
    more = {2: {3: {"share": [[0, 0], [0, 1]]}}}
    found = convert(tmp_path, "llama", {2: {0: 5}}, more)
    after = tensors_of(found.folder)
    start = "model.layers.2.self_attn."
    assert after[f"{start}k_proj.down.weight"].shape == (2 * SIZE + 5, HIDDEN)
    assert after[f"{start}q_proj.weight"].shape == (6 * SIZE, HIDDEN)
