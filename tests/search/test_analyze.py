"""`sa-convert analyze`: the command, and the similarity of layers against a plain computation."""

import json
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.units import Units
from sa_convert.errors import DataError
from sa_convert.families.table import FAMILIES
from sa_convert.observe.probe import Probe, Seen
from sa_convert.observe.sequences import REPETITION, Sample
from sa_convert.observe.similarity import attention_statistics
from sa_convert.plan.recipe_file import load_recipe
from sa_convert.treatments.share.rules import check_map
from sa_convert.treatments.share.sharing_map import SharingMap
from support.cli_cases import refused
from support.validation_models import save_base

SMALL = ("--sequences", 6, "--length", 48)
FIGURES = ["costs.png", "isotropy.png", "loss.png", "similarity.png", "sources.png"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def analyzed(tiny, tmp_path_factory, cli):
    output = tmp_path_factory.mktemp("out") / "analysis"
    return cli("analyze", tiny, "-o", output, *SMALL, "--key-cache", "20%", "--json"), output


def test_folder_holds_what_stdout_says(analyzed):
    result, output = analyzed
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content == json.loads((output / "analysis.json").read_text())
    assert sorted(path.name for path in output.iterdir()) == ["analysis.json", "figures", "recipe.yaml"]
    assert sorted(path.name for path in (output / "figures").iterdir()) == FIGURES
    assert content["base_model"] == {"id": "tiny", "revision": None}
    assert content["measure"] == "fisher"
    assert content["calibration"]["length"] == 48
    assert content["peak_memory_bytes"] > 50_000_000
    assert content["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_costs_and_curve(analyzed):
    content = json.loads(analyzed[0].stdout)
    costs = content["costs"]
    assert [len(row) for row in costs] == [2] * 5
    assert costs[0] == [None, None]
    assert all(cost >= 0 for row in costs[1:] for cost in row)
    for unit in content["units"]:
        assert unit["cost"] == costs[unit["layer"]][unit["groups"][0]]
        assert unit["layer"] == 0 or all(layer < unit["layer"] for layer, _ in unit["sources"])
        assert unit["layer"] == 0 or len(unit["sources"]) == len(unit["heads"]) == 2
    removed = [point["key_cache_removed"] for point in content["curve"]]
    assert removed == sorted(removed)
    assert removed[-1] >= 0.4
    assert [point["groups"] for point in content["curve"]] == [round(10 * part) for part in removed]
    estimates = [point["estimated_loss"] for point in content["curve"]]
    assert estimates == sorted(estimates)
    assert estimates[0] > 0
    assert all(point["measured_divergence"] >= -1e-4 for point in content["curve"])


def test_recipe_removes_what_was_asked(analyzed, cli, tiny, tmp_path):
    result, output = analyzed
    found = json.loads(result.stdout)["recipe"]
    recipe = load_recipe(str(output / "recipe.yaml"))
    sharing = SharingMap(recipe.sharing.map)
    geometry = ModelGeometry((LayerGeometry(4, 2, 16),) * 5)
    check_map(sharing, geometry)
    assert sharing.to_json() == found["layers"]
    assert sharing.reused_groups(geometry) == 2
    assert found["key_cache_removed"] == 0.2
    planned = cli("convert", tiny, "--recipe", output / "recipe.yaml", "-o", tmp_path / "x", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["savings"]["key_cache_removed"] == pytest.approx(0.2)


def test_figures_show_something(analyzed):
    for name in FIGURES:
        with Image.open(analyzed[1] / "figures" / name) as image:
            assert image.format == "PNG"
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_again_is_the_same_and_needs_overwrite(analyzed, cli, tiny):
    result, output = analyzed
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    refusal = cli("analyze", tiny, "-o", output, *SMALL, "--key-cache", "20%")
    refused(refusal, 1, "exists already; use --overwrite")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    again = cli("analyze", tiny, "-o", output, *SMALL, "--key-cache", "20%", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert f"Written to {output}" in again.stdout
    assert "Recipe" in again.stdout
    for path, content in before.items():
        if path.name != "analysis.json":
            assert path.read_bytes() == content, path
    first, second = json.loads(result.stdout), json.loads((output / "analysis.json").read_text())
    assert first.pop("peak_memory_bytes")
    assert second.pop("peak_memory_bytes")
    assert first == second


def test_overwrite_spares_what_is_not_an_analysis(cli, tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "analysis.json").write_text('{"versions": {"mine": "1"}}')
    (tmp_path / "mine" / "recipe.yaml").write_text("")
    refused(cli("analyze", tiny, "-o", tmp_path / "mine", "--overwrite"), 1, "did not write")


def test_refusals(cli, tiny, tmp_path):
    output = tmp_path / "out"
    result = cli("analyze", tiny, "-o", output, "--key-cache", "100%")
    assert result.returncode == 2
    assert "more than 0% and less than 100%" in result.stderr
    refused(cli("analyze", tiny, "-o", output, "--key-cache", "90%"), 1, "80.00% .*ask for 80% or less", output)
    refused(cli("analyze", tiny, "-o", output, "--calibration", "text.pdf"), 1, "text.pdf: text must be", output)
    (tmp_path / "short.txt").write_text("Too short.")
    short = cli("analyze", tiny, "-o", output, "--calibration", tmp_path / "short.txt")
    refused(short, 1, "short.txt.* too few", output)
    refused(cli("analyze", tmp_path / "none", "-o", output), 1, "no such folder", output)


def test_weights_that_are_not_finite(cli, tmp_path):
    folder = save_base(tmp_path / "damaged")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    result = cli("analyze", folder, "-o", tmp_path / "out", *SMALL, "--calibration", text)
    refused(result, 1, "not finite", tmp_path / "out")


def _samples(count, length, kind="text"):
    everything = torch.ones(length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    return [Sample(torch.randint(5, 290, (length,), generator=generator), kind, everything) for _ in range(count)]


def test_statistics_are_those_of_eager_attention(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager", dtype=torch.float32).eval()
    text, length, heads = _samples(2, 40), 40, 4
    attentions = []
    for sample in text:
        with torch.no_grad():
            found = model(sample.tokens[None], output_attentions=True).attentions
        attentions.append([layer[0].double().numpy() for layer in found])

    def cosine(sequence, one, another):
        a, b = (attentions[sequence][layer][head].ravel() for layer, head in (one, another))
        return float(a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5)

    def mean(values):
        return sum(values) / len(values)

    def averaged(one, another):
        return mean([cosine(0, one, another), cosine(1, one, another)])

    units = Units(ModelGeometry((LayerGeometry(heads, 2, 16),) * 5))
    statistics = attention_statistics(Probe(model, FAMILIES["llama"]), units, text + _samples(1, length, REPETITION))
    assert statistics.sequences == 2
    for layer in range(5):
        for other in range(5):
            same = mean([averaged((layer, head), (other, head)) for head in range(heads)])
            best = mean([max(averaged((layer, h), (other, j)) for j in range(heads)) for h in range(heads)])
            assert statistics.similarity[layer][other] == pytest.approx(same, abs=1e-5)
            assert statistics.matched[layer][other] == pytest.approx(best, abs=1e-5)
        others = [statistics.similarity[layer][other] for other in range(5) if other != layer]
        assert statistics.isotropy[layer] == pytest.approx(mean(others), abs=1e-9)
        variances = [
            attentions[sequence][layer][head][token, : token + 1].var()
            for sequence in range(2)
            for head in range(heads)
            for token in range(length)
        ]
        assert statistics.variance[layer] == pytest.approx(mean(variances), rel=1e-4)


class _Replayed:
    """A stand-in for a probe and its model, whose layers have the given weights."""

    def __init__(self, *layers):
        self.layers, self.model, self.weight = layers, self, torch.zeros(1)

    def get_input_embeddings(self):
        return self

    @contextmanager
    def observing(self, observer):
        self.observer = observer
        yield

    def __call__(self, **_):
        for index, weights in enumerate(self.layers):
            one = weights[None]
            rest = dict.fromkeys(("value", "output", "query", "key"), weights)
            self.observer(Seen(layer=index, probabilities=one, used=one, **rest))


def test_permuted_heads_match_and_layers_of_other_sizes_have_no_same_index():
    scores = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0)).mul(3)
    weights = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
    units = Units(ModelGeometry((LayerGeometry(3, 3, 4), LayerGeometry(3, 3, 4), LayerGeometry(2, 2, 4))))
    probe = _Replayed(weights, weights[[1, 2, 0]], weights[:2])
    statistics = attention_statistics(probe, units, _samples(1, 12))
    assert statistics.matched[1][0] == pytest.approx(1)
    assert statistics.similarity[1][0] < 0.7
    assert statistics.similarity[2][0] is statistics.similarity[0][2] is None
    assert statistics.matched[2][0] == pytest.approx(1)
    assert statistics.matched[0][2] < 1 - 1e-3
    assert statistics.isotropy[2] is None
    assert statistics.variance[0] == pytest.approx(statistics.variance[1])


def test_statistics_need_text():
    units = Units(ModelGeometry((LayerGeometry(3, 3, 4),)))
    with pytest.raises(DataError, match="at least one sequence of text"):
        attention_statistics(_Replayed(), units, _samples(1, 12, REPETITION))
