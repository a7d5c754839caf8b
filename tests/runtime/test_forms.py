"""Which form of sharing runs is chosen, or forced by the config. (That both agree: test_families.py.)"""

from types import SimpleNamespace

import pytest
import torch

from sa_convert.treatments.share.runtime import Run, Share, _gather, blocks_of
from support.processes import run_cli
from support.tiny_models import forms_used, geometry_of_folder, load_converted, make_map, save_tiny, write_recipe

HEADS = dict.fromkeys(range(6), (0, 1))


@pytest.fixture
def converted(tmp_path):
    def make(family, kind):
        save_tiny(family, tmp_path / "base")
        geometry = geometry_of_folder(tmp_path / "base")
        recipe = write_recipe(tmp_path / "recipe.json", make_map(kind, geometry), geometry.stacks)
        done = run_cli("convert", tmp_path / "base", "--recipe", recipe, "-o", tmp_path / "out", "--no-validate")
        assert done.returncode == 0, done.stderr
        return load_converted(tmp_path / "out", dtype=torch.float32)

    return make


@torch.no_grad()
def test_the_form_is_chosen_by_memory_and_by_what_it_brings(converted):
    model = converted("llama", "span")  # one layer lends to four
    used = forms_used(model)
    ids = torch.randint(3, 128, (1, 16))
    model(ids, use_cache=False)
    assert all(used)
    used.clear()
    model.config.shared_attention["weights_memory"] = 8 * 16 * 16 * 4 - 1  # heads, tokens, tokens, bytes
    model(ids, use_cache=False)
    assert not any(used)
    used.clear()
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert not used[0]
    assert all(used[1:])  # decoding


def test_training_takes_queries_and_an_unknown_form_is_refused(converted, tmp_path):
    model = converted("llama", "span")
    used = forms_used(model)
    model(torch.randint(3, 128, (1, 16)), use_cache=False).logits.sum().backward()
    assert not any(used)
    model.config.shared_attention["form"] = "both"
    with pytest.raises(ValueError, match="form is 'both', but should be one of auto, weights, queries"):
        type(model)(model.config)


def test_the_budget_is_for_all_layers_that_lend_at_one_time():
    """Layers 0 and 1 lend at once, to 3; layer 4 lends to 5 alone."""
    borrowed = {3: {0: [[0, 0]], 1: [[1, 1]]}, 5: {0: [[4, 0]], 1: [[4, 1]]}}
    stack = SimpleNamespace(
        name="", shapes=dict.fromkeys(range(6), (2, 1, 8)), layers=borrowed, options={}, heads=HEADS
    )
    share = Share(stack)
    assert [layer for layer in range(6) if share.touches(layer)] == [0, 1, 3, 4, 5]
    assert (share.at_once, share.gain) == (2, 4 / 6)
    assert share.layers[3].settled == (0, 1)


def test_blocks_end_at_what_their_tokens_see():
    assert blocks_of(300, 300, True) == [(0, 128, 128), (128, 256, 256), (256, 300, 300)]
    assert blocks_of(300, 400, False) == [(0, 128, 400), (128, 256, 400), (256, 300, 400)]
    assert blocks_of(1, 400, False) == [(0, 1, 400)]


def test_heads_that_another_process_holds_are_refused():
    """Of four heads in two groups, a process has the first two: a span may run, exchanged or mixed heads may not."""
    share = torch.arange(2.0).view(1, 2, 1, 1)
    assert torch.equal(_gather((Run(0, 0, 4),), None, {0: share}.__getitem__), share)
    for runs in ((Run(0, 2, 4), Run(0, 0, 2)), (Run(0, 2, 4),), (Run(None, 0, 1), Run(0, 1, 4))):
        with pytest.raises(RuntimeError, match="a head reuses one that is not in this process"):
            _gather(runs, share, {0: share}.__getitem__)


@pytest.mark.parametrize(
    ("rows", "divisible"),
    [
        ({3: {0: [[0, 0]], 1: [[0, 1]]}}, True),
        ({3: {0: [[0, 1]], 1: [[0, 0]]}}, False),  # another number
        (
            {3: {1: [[0, 1]]}},
            False,
        ),  # a layer that owns some heads: its queries and keys are fewer than a process takes
    ],
)
def test_what_tensor_parallelism_may_divide(rows, divisible):
    stack = SimpleNamespace(name="", shapes=dict.fromkeys(range(4), (2, 1, 8)), layers=rows, options={}, heads=HEADS)
    assert Share(stack).divisible == divisible
