"""Encoder-decoders, mixed models and encoders through the command line: layers have the names that people use."""

import json

import pytest
import yaml
from PIL import Image

from sa_convert.domain.calibrated import Distance, LayerRefit, RefitReport
from sa_convert.domain.stacks import layer_names, stack_ranges
from support.processes import run_cli
from support.tiny_models import geometry_of_folder, load_converted, save_tiny

T5 = (("encoder", 6), ("decoder", 4), ("decoder.cross", 4))
SIX_LAYERS = {"num_layers": 6, "encoder_layers": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "base"
            save_tiny(family, made[family], **(SIX_LAYERS if family in ("t5", "bart") else {}))
        return made[family]

    return model


def table(model):
    """Lines of `inspect` by label; lines without one are joined to the label before them."""
    result = run_cli("inspect", model)
    assert result.returncode == 0, result.stderr
    rows, label = {}, ""
    width = len("Cache per token") + 2
    for line in result.stdout.splitlines():
        label = line[:width].strip() or label
        rows.setdefault(label, []).append(line[width:])
    return rows


@pytest.mark.parametrize(
    ("layers", "stacks", "names"),
    [
        (range(1, 30), (), "1-29"),
        ((2, 4, 5, 6), (), "2, 4-6"),
        (range(3, 43, 2), (), "3-41 (every 2nd)"),
        (range(3, 48, 4), (), "3-47 (every 4th)"),
        ((5,), T5, "encoder.5"),
        ((4, 5, 6, 8, 9, 13), T5, "encoder.4-5, decoder.0, decoder.2-3, decoder.cross.3"),
        ((), T5, ""),
    ],
)
def test_names_of_layers(layers, stacks, names):
    assert layer_names(stacks, layers) == names


def test_layers_of_stacks():
    assert stack_ranges(T5, 14) == [
        ("encoder", range(6)), ("decoder", range(6, 10)), ("decoder.cross", range(10, 14))
    ]  # fmt: skip
    assert stack_ranges((), 3) == [("", range(3))]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_inspect_names_stacks(models, family):
    rows = table(models(family))
    assert rows["Layers"] == ["6 encoder, 4 decoder, 4 decoder.cross"]
    assert rows["Query heads"] == ["8 per layer"]
    assert rows["KV groups"] == [f"8 per layer, {14 * 8} in all"]
    assert rows["Attention"] == [f"{name}: full without rotary, all layers" for name, _ in T5]
    head_dim = geometry_of_folder(models(family)).layers[0].head_dim
    # Keys and values of 4 layers that write and 4 that read, in float32; the encoder keeps nothing.
    size = 2 * 8 * 8 * head_dim * 4
    assert rows["Cache per token"] == [
        f"{size:,} bytes in the data type of the weights, of one token read and one written"
    ]
    first, *reach = rows["Can share"]
    assert first == "yes, by query head, within each stack"
    assert [line.split("; ")[0] for line in reach] == [
        f"full without rotary: layers {name}.1-{depth - 1} can borrow from earlier ones of this kind"
        for name, depth in T5
    ]
    assert "layer decoder.cross.0 cannot" in reach[2]

    content = json.loads(run_cli("inspect", models(family), "--json").stdout)
    assert content["stacks"] == dict(T5)
    labels = [f"{name}.{number}" for name, depth in T5 for number in range(depth)]
    assert [layer["layer"] for layer in content["attention"]] == labels
    assert [(kind["stack"], kind["reusing"]) for kind in content["sharing"]["kinds"]] == [
        (name, list(range(1, depth))) for name, depth in T5
    ]
    assert set(content["sharing"]["layers_without_source"]) == {f"{name}.0" for name, _ in T5}


def test_inspect_tells_stacks_of_different_shapes(tmp_path):
    save_tiny("bart", tmp_path / "base", decoder_attention_heads=4, **SIX_LAYERS)
    rows = table(tmp_path / "base")
    assert rows["Query heads"] == ["8 encoder, 4 decoder, 4 decoder.cross per layer"]
    assert rows["Head size"] == ["8 encoder, 16 decoder, 16 decoder.cross"]


@pytest.mark.parametrize(
    ("family", "layers", "reach"),
    [
        ("jamba", "6 (softmax attention in 1, 3, 5)", "layers 3, 5 can borrow"),
        ("qwen3_next", "6 (softmax attention in 1-2, 4-5)", "layers 2, 4-5 can borrow"),
    ],
)
def test_inspect_tells_which_layers_have_softmax_attention(models, family, layers, reach):
    rows = table(models(family))
    assert rows["Layers"] == [layers]
    assert reach in rows["Can share"][1]
    assert rows["Attention"][0].startswith("0 no softmax attention, 1")
    content = json.loads(run_cli("inspect", models(family), "--json").stdout)
    assert content["stacks"] == {}
    attending = [layer["layer"] for layer in content["attention"] if layer["heads"]]
    assert attending == [str(number) for number in content["sharing"]["kinds"][0]["layers"]]


def test_inspect_says_that_an_encoder_caches_nothing(models):
    assert table(models("bert"))["Cache per token"] == [
        "none: an encoder caches nothing; sharing saves parameters and compute"
    ]
    assert json.loads(run_cli("inspect", models("bert"), "--json").stdout)["cache_bytes_per_token"] == 0


def dry_run(model, recipe, *options):
    result = run_cli("convert", model, "--recipe", recipe, "-o", model.parent / "none", "--dry-run", *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


SPANS = {
    "t5": "encoder.5, decoder.3, decoder.cross.3",
    "bart": "encoder.5, decoder.3, decoder.cross.3",
    "jamba": "5",
    "qwen3_next": "5",
    "bert": "5",
}


@pytest.mark.parametrize("family", SPANS)
def test_dry_run_of_the_late_span(models, family):
    output = dry_run(models(family), "late-span")
    assert f"layers that borrow wholly  {SPANS[family]}\n" in output
    no_cache = "cache per token            none: the model caches nothing\n"
    assert (no_cache in output) == (family == "bert")
    layers = json.loads(dry_run(models(family), "late-span", "--json"))["sharing"]["layers"]
    assert ", ".join(layers) == SPANS[family]
    # The source is the nearest earlier layer with attention, by its number in the stack.
    for label, row in layers.items():
        number = int(label.rpartition(".")[2])
        assert row == [[number - (2 if family == "jamba" else 1), head] for head in range(8)]


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        ("t5", "{layers: 4-5}", "span 4-5 is outside of the model, which has 4 layers (decoder.0 to decoder.3); spans"),
        ("t5", "{layers: 0%-20%}", "layer encoder.0 has no source: it is the first; start the span later"),
        ("bart", "{layers: 50%-60%, source: 3}", "source 3 is not before span 50%-60%, which is layers encoder.3-4"),
        ("jamba", "{layers: 4}", "no layer of span 4 has softmax attention; name others"),
        (
            "jamba",
            "{layers: 3, source: 2}",
            "Layer 3 head 0 cannot borrow from layer 2 head 0: the source layer has no soft",
        ),
        ("jamba", "{layers: 1-3}", "layer 1 has no source: none before layers 1-3 is of its kind (full_attention)"),
    ],
)
def test_spans_that_do_not_fit_are_told_by_the_names_of_layers(models, tmp_path, family, content, message):
    (tmp_path / "spans.yaml").write_text(f"sharing: {{spans: [{content}]}}\n")
    result = run_cli("convert", models(family), "--recipe", tmp_path / "spans.yaml", "-o", tmp_path / "o", "--dry-run")
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_span_passes_over_layers_without_attention(models, tmp_path):
    (tmp_path / "spans.yaml").write_text("sharing: {spans: [{layers: 2-5, source: 1}]}\n")
    layers = json.loads(dry_run(models("jamba"), tmp_path / "spans.yaml", "--json"))["sharing"]["layers"]
    assert layers == {label: [[1, head] for head in range(8)] for label in ("3", "5")}


@pytest.mark.parametrize("family", ["t5", "jamba", "bert"])
def test_converted_folders_name_layers(models, tmp_path, family):
    result = run_cli("convert", models(family), "--recipe", "late-span", "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == 0, result.stderr
    shown = result.stdout.splitlines()
    assert ("Cache per token  none: the model caches nothing" in shown) == (family == "bert")
    load_converted(tmp_path / "out")
    labels = SPANS[family].split(", ")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(config["shared_attention"]["layers"]) == labels
    assert list(report["sharing"]["layers"]) == labels
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert [str(label) for label in recipe["sharing"]["map"]] == labels
    card = (tmp_path / "out" / "README.md").read_text()
    for label in labels:
        assert f"\n| {label} | all 8 | {label[:-1]}{int(label[-1]) - (2 if family == 'jamba' else 1)} (same" in card
    saves = {
        "t5": "The encoder caches nothing: what sharing saves there are parameters",
        "bert": "The model caches nothing: what sharing saves are parameters",
    }
    assert all((text in card) == (family == name) for name, text in saves.items())
    assert ("cache bytes per token" in card) == (family != "bert")
    with Image.open(tmp_path / "out" / "figures" / "sharing.png") as image:
        # A band of 8 groups for each stack, of 4 for jamba.
        assert (image.height > 3 * 8 * 40) == (family == "t5")
    again = run_cli(
        "convert", models(family), "--recipe", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "two", "--no-validate"
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "two" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_a_converted_encoder_decoder_is_inspected(models, tmp_path):
    result = run_cli("convert", models("bart"), "--recipe", "late-span", "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == 0, result.stderr
    rows = table(tmp_path / "out")
    assert rows["Shares already"] == ["24 of 112 KV groups, in layers encoder.5, decoder.3, decoder.cross.3"]
    # 8 layers cache values, 6 of them keys: 8 heads of 8 floats.
    assert rows["Cache per token"][0].startswith(f"{(8 + 6) * 8 * 8 * 4:,} bytes")


def test_refits_are_told_by_the_names_of_layers():
    distance = Distance(1.0, 0.5, None)
    report = RefitReport(
        1.0, {5: LayerRefit(0.1, 0.9, None), 13: LayerRefit(None, 1.0, None)}, distance, distance, "builtin", 8, 64
    )
    assert list(report.to_json(T5)["layers"]) == ["encoder.5", "decoder.cross.3"]
    assert list(report.to_json()["layers"]) == ["5", "13"]
