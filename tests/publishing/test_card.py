"""The model card and the figure."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image, ImageColor

from sa_convert.domain.change import Change
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.report import BaseModel
from sa_convert.present.charts import plan_figure
from sa_convert.present.charts.plan_figure import CELL, OWN, _font, drawings_of
from sa_convert.present.charts.plan_figure import SHARING as FIGURE
from sa_convert.present.files.card import write_card
from sa_convert.treatments.share.drawing import LOOKS, told
from sa_convert.treatments.share.plans import plan_of
from sa_convert.treatments.share.sharing_map import SharingMap
from support.measured_report import MEASURED, UNMEASURED
from support.processes import ROOT

COLOURS = {OWN.state: OWN.colour} | {state: look.colour for state, look in LOOKS.items()}
WHITE = (255, 255, 255)
RECIPE = "sharing:\n  map: {27: [[26, 4], null]}\n"
BASE_CARD = """---
license: other
license_name: special
license_link: https://example.org/licence
language: [en, de]
tags: [chat]
model-index: broken
---
# Base
"""


def shared_as(sharing, caches=True):
    """A report of a model that shares so."""
    return replace(MEASURED, treated=(told(sharing, 12, 90, caches),), stacks=sharing.stacks)


def cells(sharing, model):
    return plan_figure.cells(drawings_of(plan_of(sharing, model), model), model)


def sharing_figure(sharing, model, path):
    return plan_figure.plan_figure(plan_of(sharing, model), model, path)


def test_metadata_and_licence_of_the_base(tmp_path):
    (tmp_path / "base.md").write_text(BASE_CARD)
    card = ModelCard.load(write_card(MEASURED, RECIPE, tmp_path, tmp_path / "base.md"))
    data = card.data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert (data["license"], data["license_name"], data["language"]) == ("other", "special", ["en", "de"])
    assert "shared-attention" in data["tags"]
    assert "chat" not in data["tags"]
    result = card.data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("perplexity", 15.0)
    assert result.dataset_name == "builtin, validation part"


def test_body_holds_what_was_measured(tmp_path):
    text = write_card(MEASURED, RECIPE, tmp_path).read_text()
    assert text.count("trust_remote_code=True") == 2  # model and tokenizer
    for part in (
        "14.295 before, **15.000** after (+4.93%)",
        "limit that was set, 5%",
        "128 random tokens repeated; 3,072 repeated tokens): loss 1.78 nats per token before, **1.98** after (+0.20)",
        "at most 8.9e-05 (tolerance 0.0013)",
        "| 27 | 1 of 2 | 26 |",
        "| 28 | all 2 | 22 (same heads) |",
        "| cache bytes per token (measured) | 46,080 | 43,008 | -6.7% |",
        f"```yaml\n{RECIPE.strip()}\n```",
        "sa_convert 0.1.0, transformers 5.23.0",
        "licence of the base model applies",
    ):
        assert part in text
    assert "sharing.png" not in text


def test_consecutive_layers_that_share_alike_are_one_row(tmp_path):
    span = SharingMap(dict.fromkeys((23, 24, 25), ((22, 0), (22, 1))))
    text = write_card(shared_as(span), RECIPE, tmp_path).read_text()
    assert "| 23-25 | all 2 | 22 (same heads) |" in text


def test_rows_of_stacks_have_their_names(tmp_path):
    stacks = (("encoder", 4), ("decoder", 3), ("decoder.cross", 3))
    rows = {layer: ((source, 0), (source, 1)) for layer, source in ((2, 1), (3, 1), (5, 4), (6, 4), (9, 7))}
    shared = SharingMap({**rows, 8: (None, (7, 0))}, stacks)
    text = write_card(shared_as(shared), RECIPE, tmp_path).read_text()
    table = text.partition("|---|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert table == [
        "| encoder.2-3 | all 2 | encoder.1 (same heads) |",
        "| decoder.1-2 | all 2 | decoder.0 (same heads) |",
        "| decoder.cross.1 | 1 of 2 | decoder.cross.0 |",
        "| decoder.cross.2 | all 2 | decoder.cross.0 (same heads) |",
    ]
    assert "The encoder caches nothing: what sharing saves there are parameters" in text


def test_layers_of_two_stacks_are_never_one_row(tmp_path):
    # Layers 1 and 2 follow each other, the last of one stack and the first but one of the next.
    shared = SharingMap({1: ((0, 0),), 3: ((2, 0),)}, (("encoder", 2), ("decoder", 2)))
    text = write_card(shared_as(shared), RECIPE, tmp_path).read_text()
    assert "| encoder.1 | all 1 | encoder.0 (same heads) |\n| decoder.1 | all 1 | decoder.0 (same heads) |" in text


def test_an_encoder_saves_no_cache(tmp_path):
    savings = replace(MEASURED.savings, cache_bytes_per_token=Change(0, 0))
    encoder = replace(
        shared_as(SharingMap({1: ((0, 0),)}), False),
        savings=savings,
        decode_check=None,
        copying=None,
        auto_class="AutoModelForMaskedLM",
    )
    text = write_card(encoder, RECIPE, tmp_path).read_text()
    assert "The model caches nothing: what sharing saves are parameters, and the computation of queries, keys" in text
    assert "cache bytes" not in text
    assert "| keys (the model caches nothing) | | | -13.3% |" in text
    assert "cache no keys" not in text


def test_a_multimodal_model_is_loaded_with_its_processor(tmp_path):
    report = replace(MEASURED, auto_class="AutoModelForImageTextToText")
    text = write_card(report, RECIPE, tmp_path).read_text()
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor\n" in text
    assert 'processor = AutoProcessor.from_pretrained("PATH_OR_REPO_ID", trust_remote_code=True)' in text
    assert "AutoTokenizer" not in text


def test_without_validation_no_quality_is_claimed(tmp_path):
    path = write_card(UNMEASURED, RECIPE, tmp_path)
    text = path.read_text()
    assert "**Not measured:**" in text
    assert "computed, not measured" in text
    assert not re.search(r"before, \*\*|tolerance|model-index|limit that was set", text)
    assert ModelCard.load(path).data.eval_results is None


def test_local_base_is_not_claimed_to_be_on_the_hub(tmp_path):
    local = replace(MEASURED, base_model=BaseModel("smol.gguf"))
    path = write_card(local, RECIPE, tmp_path)
    assert "base_model" not in ModelCard.load(path).data.to_dict()
    assert "huggingface.co" not in path.read_text()


@pytest.mark.parametrize("content", ["---\nlicense: [oops\n---\n", "---\n- a\n- b\n---\n", "# no metadata\n", "\udcff"])
def test_unreadable_base_card_is_said_and_not_fatal(tmp_path, content):
    (tmp_path / "base.md").write_bytes(content.encode(errors="surrogateescape"))
    text = write_card(MEASURED, RECIPE, tmp_path, tmp_path / "base.md").read_text()
    assert "licence of the base model applies" in text
    metadata = yaml.safe_load(text.split("---")[1])
    assert "license" not in metadata


def test_same_input_gives_the_same_card(tmp_path):
    assert write_card(MEASURED, RECIPE, tmp_path).read_bytes() == write_card(MEASURED, RECIPE, tmp_path).read_bytes()


def geometry(layers: int) -> ModelGeometry:
    return ModelGeometry(tuple(LayerGeometry(heads=4, groups=2, head_dim=8) for _ in range(layers)))


def test_cells_tell_own_source_partial_and_borrowed():
    sharing = SharingMap({2: ((0, 0), (1, 3), None, (1, 2)), 3: (None, None, (0, 0), None)})
    found = {(cell.layer, cell.group): cell for cell in cells(sharing, geometry(4))}
    states = {place: cell.state for place, cell in found.items()}
    assert states == {
        (0, 0): "source", (0, 1): "own", (1, 0): "own", (1, 1): "source",
        (2, 0): "borrowed", (2, 1): "partial", (3, 0): "own", (3, 1): "partial",
    }  # fmt: skip
    assert (found[2, 0].label, found[2, 1].label, found[0, 0].label) == ("0\n1", "1", "")


@pytest.mark.parametrize("layers", [12, 80])
def test_figure_has_equal_bytes_and_is_shown_by_the_card(tmp_path, layers):
    sharing = SharingMap({5: ((3, 0), (3, 1), (3, 2), (3, 3))})
    path = sharing_figure(sharing, geometry(layers), tmp_path / FIGURE)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert sharing_figure(sharing, geometry(layers), path).read_bytes() == first
    assert "(figures/sharing.png)" in write_card(MEASURED, RECIPE, tmp_path).read_text()


@pytest.mark.parametrize(("layers", "columns"), [(12, 12), (80, 40)])
def test_figure_has_a_cell_of_its_colour_for_every_group_in_order(tmp_path, layers, columns):
    sharing = SharingMap({layers - 1: ((0, 0), (0, 1), (1, 2), None)})
    # Corners of squares; entries of the legend are only half as high.
    found = list(squares(sharing_figure(sharing, geometry(layers), tmp_path / FIGURE)).values())
    drawn = {(cell.layer // columns, cell.group, cell.layer): cell.state for cell in cells(sharing, geometry(layers))}
    assert found == [ImageColor.getrgb(COLOURS[drawn[place]]) for place in sorted(drawn)]


def squares(path):
    """Place (x, y) and colour of every square."""
    colours = {ImageColor.getrgb(colour) for colour in COLOURS.values()}
    with Image.open(path) as image:
        pixel, (width, height) = image.getpixel, image.size
        return {
            (x, y): pixel((x, y))
            for y in range(1, height - CELL)
            for x in range(1, width)
            if pixel((x, y)) in colours
            and WHITE == pixel((x - 1, y)) == pixel((x, y - 1))
            and pixel((x, y)) == pixel((x, y + CELL - 3)) == pixel((x + CELL - 3, y))
        }


def test_each_stack_has_a_band(tmp_path):
    layers = [LayerGeometry(4, 2, 8, stack="encoder")] * 5
    layers += [LayerGeometry(3, 3, 8, stack=name) for name in ("decoder", "decoder.cross") for _ in range(2)]
    model = ModelGeometry(tuple(layers))
    sharing = SharingMap({4: ((2, 0), (3, 1), None, None), 8: ((7, 0), (7, 1), None)}, model.stacks)
    labels = {(cell.layer, cell.group): cell.label for cell in cells(sharing, model) if cell.label}
    assert labels == {(4, 0): "2\n3", (8, 0): "0", (8, 1): "0"}  # numbers in the stack
    found = squares(sharing_figure(sharing, model, tmp_path / "sharing.png"))
    rows = [[place[0] for place in found if place[1] == y] for y in sorted({y for _, y in found})]
    assert [len(row) for row in rows] == [5, 5, 2, 2, 2, 2, 2, 2]
    assert len({row[0] for row in rows}) == 1  # all bands begin at the left
    borrowed = ImageColor.getrgb(COLOURS["borrowed"])
    assert list(found.values()).count(borrowed) == 3


def test_layers_without_softmax_attention_are_blank(tmp_path):
    none, full = LayerGeometry(0, 0, 0, "none"), LayerGeometry(4, 2, 8)
    model = ModelGeometry((none, full, none, full))
    sharing = SharingMap({3: ((1, 0), (1, 1), (1, 2), (1, 3))})
    found = squares(sharing_figure(sharing, model, tmp_path / "sharing.png"))
    columns = sorted({x for x, _ in found})
    assert [(x - columns[0]) // CELL for x in columns] == [0, 2]
    assert len(found) == 4


def test_font_of_the_figure_is_scalable():
    assert _font(40).getlength("KV group") == pytest.approx(2 * _font(20).getlength("KV group"), rel=0.05)


def test_card_and_figure_load_neither_the_hub_client_nor_matplotlib(tmp_path):
    """Each takes longer to load than the kernel takes to copy a gigabyte."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import support.measured_report as t; from pathlib import Path\n"
        "from sa_convert.present.files.card import write_card\n"
        "from sa_convert.present.charts.plan_figure import plan_figure\n"
        "from sa_convert.domain.plan import Plan\n"
        "from sa_convert.domain.geometry import LayerGeometry as L, ModelGeometry as M\n"
        "folder = Path(sys.argv[1]); base = folder / 'base.md'; base.write_text('---\\nlicense: mit\\n---\\n')\n"
        "write_card(t.MEASURED, '', folder, base)\n"
        "plan_figure(Plan(), M((L(2, 1, 8),)), folder / 'f.png')\n"
        "print([m for m in ('matplotlib', 'huggingface_hub.hf_api', 'numpy', 'torch') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT / "tests")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
