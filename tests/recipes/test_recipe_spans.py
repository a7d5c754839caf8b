"""Spans resolved to maps of models of all shapes."""

from dataclasses import replace

import pytest

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.layer_range import LayerRange
from sa_convert.errors import RecipeError
from sa_convert.plan.recipe_file import load_recipe, parse_recipe
from sa_convert.treatments.share.rules import check_map
from sa_convert.treatments.share.spans import layer_range, sharing_of

FULL = LayerGeometry(4, 2, 8)
SLIDING = LayerGeometry(4, 2, 8, "sliding_attention", 16)
NONE = LayerGeometry(0, 0, 0, "none")


def uniform(depth):
    return ModelGeometry((FULL,) * depth)


def resolve(text, geometry):
    """Source layer of each reusing layer; checks that head i reuses head i."""
    sharing = sharing_of(parse_recipe(f"sharing:\n  spans:\n{text}", "r.yaml"), geometry)
    check_map(sharing, geometry)
    for layer, row in sharing.layers.items():
        assert [head for _, head in row] == list(range(geometry.layers[layer].heads))
        assert len({source for source, _ in row}) == 1
    return {layer: row[0][0] for layer, row in sharing.layers.items()}


@pytest.mark.parametrize(
    ("text", "depth", "first", "last"),
    [
        ("84%-94%", 32, 27, 30),
        ("84%-94%", 30, 25, 28),
        ("84%-94%", 24, 20, 23),
        ("84%-94%", 80, 67, 75),
        ("84%-94%", 6, 5, 5),
        ("84%-94%", 3, 2, 2),
        ("72%-81%", 32, 23, 26),
        ("50%", 7, 4, 4),  # 3.5: halves go up
        ("99%-100%", 32, 31, 31),
        ("27-30", 32, 27, 30),
        ("5", 32, 5, 5),
    ],
)
def test_layers_by_number_and_depth(text, depth, first, last):
    layers = layer_range(LayerRange.parse(text), depth)
    assert (layers[0], layers[-1]) == (first, last)


def test_default_source_is_the_layer_before():
    assert resolve("  - layers: 3-5", uniform(8)) == {3: 2, 4: 2, 5: 2}


def test_named_source():
    assert resolve("  - {layers: 3-5, source: 0}", uniform(8)) == {3: 0, 4: 0, 5: 0}


def test_chained_spans_end_at_the_layer_that_owns_its_attention():
    chained = {2: 1, 3: 1, 4: 1, 5: 1, 6: 1}
    assert resolve("  - layers: 2-3\n  - layers: 4-5\n  - {layers: 6, source: 5}", uniform(8)) == chained
    assert resolve("  - {layers: 6, source: 5}\n  - layers: 4-5\n  - layers: 2-3", uniform(8)) == chained


@pytest.mark.parametrize("depth", range(2, 40))
def test_late_span_fits_any_uniform_model(depth):
    sharing = sharing_of(load_recipe("late-span"), uniform(depth))
    check_map(sharing, uniform(depth))
    assert sharing.layers


def test_alternating_layers_reuse_the_nearest_of_their_kind_outside_of_the_span():
    gemma2 = ModelGeometry((SLIDING, FULL) * 13)
    assert resolve("  - layers: 84%-94%", gemma2) == {22: 20, 23: 21, 24: 20}
    gemma3 = ModelGeometry(((SLIDING,) * 5 + (FULL,)) * 4 + (SLIDING,) * 2)
    assert resolve("  - layers: 84%-94%", gemma3) == {22: 21, 23: 17, 24: 21}


def test_layers_with_another_number_of_heads_are_no_default_source():
    geometry = ModelGeometry((FULL, LayerGeometry(8, 2, 8), FULL))
    assert resolve("  - layers: 2", geometry) == {2: 0}


def stacked(encoder, decoder):
    """An encoder-decoder whose stacks have these depths."""
    names = {"encoder": encoder, "decoder": decoder, "decoder.cross": decoder}
    return ModelGeometry(tuple(replace(FULL, stack=name) for name, depth in names.items() for _ in range(depth)))


def test_spans_are_of_each_stack():
    assert resolve("  - layers: 2-3", stacked(6, 4)) == {2: 1, 3: 1, 8: 7, 9: 7, 12: 11, 13: 11}
    assert resolve("  - layers: 84%-94%", stacked(12, 6)) == {10: 9, 11: 9, 17: 16, 23: 22}
    assert resolve("  - {layers: 50%-75%, source: 0}", stacked(4, 4)) == {2: 0, 3: 0, 6: 4, 7: 4, 10: 8, 11: 8}


def test_a_stack_of_one_layer_is_passed_over():
    assert resolve("  - layers: 84%-94%", stacked(6, 1)) == {5: 4}
    with pytest.raises(RecipeError, match="it is the first"):
        resolve("  - layers: 84%-94%", uniform(1))


def test_chained_spans_of_a_stack_end_within_it():
    chained = {2: 1, 3: 1, 6: 5, 7: 5, 10: 9, 11: 9}
    assert resolve("  - layers: 2\n  - {layers: 3, source: 2}", stacked(4, 4)) == chained


def test_layers_without_softmax_attention_are_passed_over():
    mixed = ModelGeometry((NONE, NONE, NONE, FULL) * 12)
    assert resolve("  - layers: 84%-94%", mixed) == {43: 39}
    assert resolve("  - layers: 30-47", mixed) == dict.fromkeys((31, 35, 39, 43, 47), 27)
    with pytest.raises(RecipeError, match="no layer of span 40-42 has softmax attention"):
        resolve("  - layers: 40-42", mixed)


REFUSED = {
    "  - layers: 2-3\n  - layers: 27-30": "line 4: span 27-30 is outside of the model, which has 8 layers (0 to 7)",
    "  - layers: 2-4\n  - layers: 4-5": "line 4: span 4-5 overlaps with another span at layer 4",
    "  - layers: 50%-60%\n    source: 6": "line 3: source 6 is not before span 50%-60%, which is layers 4-5",
    "  - layers: 0%-20%": "line 3: layer 0 has no source: it is the first; start the span later",
}


@pytest.mark.parametrize("text", REFUSED)
def test_spans_that_do_not_fit(text):
    with pytest.raises(RecipeError) as caught:
        resolve(text, uniform(8))
    message = str(caught.value).removeprefix("r.yaml")
    assert message.removeprefix(", ").startswith(REFUSED[text])
    assert message != str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  - layers: 3-5", r"has 4 layers \(decoder.0 to decoder.3\); spans are of all stacks alike: write fractions"),
        ("  - layers: 0%-20%", r"layer encoder.0 has no source: it is the first"),
        ("  - {layers: 50%-60%, source: 3}", r"source 3 is not before span 50%-60%, which is layers encoder.3-4 in"),
        ("  - layers: 2-3\n  - layers: 3", r"overlaps with another span at layer encoder.3"),
    ],
)
def test_messages_name_the_stack(text, message):
    with pytest.raises(RecipeError, match=message):
        resolve(text, stacked(6, 4))


def test_a_layer_that_is_the_first_of_its_kind_has_no_source():
    with pytest.raises(RecipeError, match=r"layer 2 has no source: none before layers 2-3 is of its kind \(slid"):
        resolve("  - layers: 2-3", ModelGeometry((FULL, FULL, SLIDING, FULL)))
