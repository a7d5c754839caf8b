"""The parts of docs/benchmarks/quality.py that its conclusions rest on."""

import json
import sys
from fractions import Fraction

import pytest
import torch

from support.processes import ROOT, run_cli
from support.tiny_models import geometry_of_folder, load_converted, save_tiny, write_recipe

sys.path.append(str(ROOT / "docs" / "benchmarks"))

import quality_page
import quality_tables
from quality_baselines import Divergence, cheapest_layers, fit_linear, replaced, span_candidates, span_rows
from quality_counts import cache_bytes, layers_around, named, whole_layers
from quality_text import articles

from sa_convert.measure.quality.cache_bytes import cache_bytes_per_token
from sa_convert.observe.sequences import CalibrationSet, Sample

RESULTS = ROOT / "docs" / "benchmarks" / "quality.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "llama"
    return folder, save_tiny("llama", folder)


def attentions_of(model):
    return [layer.self_attn for layer in model.model.layers]


def test_deletion_is_a_zero_output_projection(tiny):
    _, model = tiny
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = model(tokens).logits
        with replaced(attentions_of(model), {1: None, 4: None}):
            deleted = model(tokens).logits
        assert torch.equal(model(tokens).logits, base)
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for layer in (1, 4):
            for parameter in model.model.layers[layer].self_attn.o_proj.parameters():
                parameter.zero_()
        expected = model(tokens).logits
        model.load_state_dict(kept)
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(deleted, expected)


def test_linear_map_finds_attention_that_is_linear(tiny):
    """A sequence of one token attends to itself alone: attention is its values, through the output projection."""
    _, model = tiny
    tokens = torch.arange(3, 128)[torch.randperm(125, generator=torch.Generator().manual_seed(0))]
    samples = [Sample(token[None], "text", torch.ones(1, dtype=torch.bool)) for token in tokens]
    maps = fit_linear(model, attentions_of(model), CalibrationSet("tokens", tuple(samples[:100]), tuple(samples[100:])))
    for layer in (0, 3):
        attention = model.model.layers[layer].self_attn
        value, output = attention.v_proj, attention.o_proj
        repeated = value.weight.view(4, 16, 64).repeat_interleave(2, dim=0).reshape(128, 64)
        bias = value.bias.view(4, 16).repeat_interleave(2, dim=0).reshape(128)
        weight = (output.weight @ repeated).T
        assert (maps[layer].weight - weight).norm() / weight.norm() < 0.02
        torch.testing.assert_close(maps[layer].bias, output.weight @ bias + output.bias, atol=0.02, rtol=0.02)
    with torch.no_grad():
        base = model(tokens[100:, None]).logits
        with replaced(attentions_of(model), maps):
            linear = model(tokens[100:, None]).logits
        longer = tokens.view(5, 25)
        with replaced(attentions_of(model), maps):
            other = model(longer).logits
        assert (linear - base).norm() / base.norm() < 0.02 < (other - model(longer).logits).norm() / base.norm()


def test_divergence_is_from_the_base(tiny):
    _, model = tiny
    tokens = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    late = torch.arange(40) >= 30
    samples = [Sample(tokens[0], "text", torch.ones(40, dtype=torch.bool)), Sample(tokens[1], "again", late, 0.5)]
    divergence = Divergence(model, samples)
    assert divergence() == 0.0
    with torch.no_grad():
        base = model(tokens).logits.double().softmax(-1)
        with replaced(attentions_of(model), {2: None}):
            found = divergence()
            changed = model(tokens).logits.double().softmax(-1)
    of_token = (base * (base.log() - changed.log())).sum(-1)
    expected = (of_token[0, :-1].mean() + 0.5 * of_token[1, 29:-1].mean()) / 1.5
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert found > 1e-3


def test_a_deleted_layer_saves_the_bytes_of_two_shared_ones(tiny, tmp_path):
    folder, model = tiny
    geometry, tokens = geometry_of_folder(folder), torch.arange(3, 11)
    assert cache_bytes(geometry, 4) == cache_bytes_per_token(model, tokens)
    recipe = write_recipe(tmp_path / "span.json", span_rows(((2, 3),), 8))
    done = run_cli("convert", folder, "--recipe", recipe, "-o", tmp_path / "out", "--no-validate", "--json")
    shared = cache_bytes_per_token(load_converted(tmp_path / "out"), tokens)
    assert shared == json.loads(done.stdout)["savings"]["cache_bytes_per_token"]["after"]
    assert shared == cache_bytes(geometry, 4, without=(5,)) == cache_bytes(geometry, 4) * 5 / 6


def test_layers_nearest_to_a_budget():
    assert [whole_layers(Fraction(percent, 100), 30) for percent in (1, 10, 25, 40)] == [1, 3, 7, 12]
    assert whole_layers(Fraction("40/3") / 100, 30) == 4
    assert [layers_around(Fraction(percent, 100), 30) for percent in (1, 10, 25, 40)] == [[1], [1, 2], [4], [6]]


@pytest.mark.parametrize("layers", [1, 3, 7, 12])
def test_span_candidates_are_spans(layers):
    candidates = span_candidates(30, layers)
    assert len(candidates) == len(set(candidates)) >= 3
    assert any(len(spans) == 1 for spans in candidates)
    for spans in candidates:
        rows = span_rows(spans, 9)
        assert len(rows) == layers
        assert all(source not in rows and source < layer for layer, row in rows.items() for source, _ in row)
    assert named(((17, 20), (25, 25))) == "17-20 <- 16, 25 <- 24"


def test_cheapest_layers_are_measured_together():
    """Layers 1 and 2 are cheap alone and dear together, so that one that is dearer alone comes first."""
    cost = {0: 9.0, 1: 1.0, 2: 1.5, 3: 2.0, 4: 5.0}
    tried = []

    def cost_of(layers):
        tried.append(layers)
        return sum(cost[layer] for layer in layers) + (10.0 if {1, 2} <= set(layers) else 0.0)

    assert list(cheapest_layers(3, 5, cost_of)) == [(1,), (1, 3), (1, 3, 4)]
    # The second round stops at the layer that added less than any other ever did, the third knows what layer 2 added.
    assert tried[5:] == [(1, 2), (1, 3), (1, 3, 4)]


def test_articles_are_prose():
    sentence = (
        "The river rises in the [[Alps|high {{nowrap|Alps}} range]] and '''flows''' to the [[sea]].<ref>A book</ref> "
    )
    article = (
        "{{Infobox|a={{b}}}}\n[[File:River.jpg|thumb|A [[river]]]]\n" + 4 * sentence + "\n== Course ==\n* a list\n"
    )
    page = f'<page><text xml:space="preserve">{article * 30}</text></page><text>short</text>'.replace("<ref", "&lt;ref")
    (found,) = articles(page.replace("</ref>", "&lt;/ref&gt;").replace("ref>", "ref&gt;"))
    assert found.startswith("The river rises in the high  range and flows to the sea. The river".replace("  ", " "))
    assert 2000 < len(found) <= 2500
    assert not set("{}[]<>=*|'") & set(found)


def made_up_results():
    base = {"news": [3.0, 3.2, 3.1], "encyclopaedia": [2.0, 2.1], "built-in": [2.5, 2.5], "copying": [1.0, 1.1]}

    def row(method, rise, key_cache, cache, **more):
        losses = {name: [loss + rise * (1 + 0.1 * at) for at, loss in enumerate(found)] for name, found in base.items()}
        fixed = {"what": "x", "budget": 10.0, "parameters": 90, "seconds": 1.0, "versions": {"torch": "2"}}
        return {"method": method, "key_cache_removed": key_cache, "cache_bytes_per_token": cache, "losses": losses,
                **fixed, **more}  # fmt: skip

    rows = [
        row("paper", 0.2, 0.10, 950),
        row("paper", 0.3, 0.12, 940),
        row("ours, refit", 0.02, 0.11, 945),
        row("drop", 0.1, 0.03, 970),
    ]
    return {
        "model": "made up",
        "base": {"parameters": 100, "cache_bytes_per_token": 1000, "losses": base},
        "rows": rows,
    }


def test_ratio_is_of_spans_that_remove_no_more():
    results = made_up_results()
    table = quality_tables.ratio_table(results)
    assert "| 11.0% | x | 10.0% | 10.0 ± 0.0 |" in table
    assert "12.0%" not in table
    targets = quality_tables.target_table(results)
    assert "+2.2% | +2.5%: met | +0.021 | 0.1: met" in targets


def test_page_and_figure_of_any_results(tmp_path):
    from PIL import Image

    text = quality_page.page(made_up_results())
    assert "| attention deleted (LLM-Drop): x | 3.0% | +11.4% | +11.1% | +0.105 ± 0.005 | -10.0% |" in text
    quality_page.write_figure(made_up_results(), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 1000


def test_page_is_what_the_results_say():
    assert quality_page.PAGE.read_text() == quality_page.page(json.loads(RESULTS.read_text()))
