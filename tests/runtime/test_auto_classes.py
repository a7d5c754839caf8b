"""A converted folder loads by every auto class that loads its base, whatever class the checkpoint was saved from."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from sa_convert.families.model_classes import model_classes_of
from sa_convert.families.table import FAMILIES
from sa_convert.models.auto_class import auto_class_name
from support.forced_softmax import forced
from support.processes import ROOT, run_cli
from support.tiny_models import geometry_of_folder, make_map, save_tiny, save_tokenizer, write_recipe

TYPES = ("qwen3", "gpt2", "bert", "gemma3_text", "t5", "bart")
OF_THE_BASE = {
    "qwen3": {"AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"},
    "gpt2": {"AutoModel", "AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"},
    "bert": {"AutoModel", "AutoModelForCausalLM", "AutoModelForMultipleChoice", "AutoModelForTextEncoding"},
    "gemma3_text": {"AutoModel", "AutoModelForSequenceClassification"},
    "t5": {"AutoModel", "AutoModelForTextEncoding", "AutoModelForSequenceClassification", "AutoModelForPreTraining"},
    "bart": {"AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"},
}
"""Some that each must have, told from the documentation of transformers."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Type -> the base in eager mode, the home of folders `base` and `out`, and the map in the layers' numbers."""
    cases = {}
    for model_type in TYPES:
        home = tmp_path_factory.mktemp(model_type)
        base = save_tiny(model_type, home / "base")
        save_tokenizer(home / "base")
        geometry = geometry_of_folder(home / "base")
        rows = make_map("heads", geometry)
        recipe = write_recipe(home / "recipe.json", rows, geometry.stacks)
        result = run_cli("convert", home / "base", "--recipe", recipe, "-o", home / "out", "--no-validate")
        assert result.returncode == 0, result.stderr
        cases[model_type] = base, home, rows
    return cases


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_auto_class_of_the_base_has_ours(model_type):
    """Against all the tables of this transformers, auto classes included that the table of ours does not name."""
    family = FAMILIES[model_type]
    found = model_classes_of(family, family.default_class)
    for name in dir(transformers):
        mapping = (
            getattr(getattr(transformers, name, None), "_model_mapping", {}) if name.startswith("AutoModel") else {}
        )
        architecture = getattr(mapping, "_model_mapping", {}).get(model_type)
        if architecture and getattr(transformers, architecture).config_class.__name__ == family.config_class:
            assert found.pop(name) == architecture, name
    # A multimodal model generates from text alone as well.
    assert not found or (family.text and set(found) == {"AutoModelForCausalLM"})


@pytest.mark.parametrize("model_type", TYPES)
def test_each_auto_class_loads_what_it_loads_of_the_base(made, tmp_path, model_type):
    _, home, _ = made[model_type]
    config = json.loads((home / "out" / "config.json").read_text())
    named = [name for name in config["auto_map"] if name != "AutoConfig"]
    assert {*OF_THE_BASE[model_type], auto_class_name(config)} <= set(named)
    for name in named:
        auto_class = getattr(transformers, name)
        expected, wanted = auto_class.from_pretrained(home / "base", output_loading_info=True)
        model, info = auto_class.from_pretrained(home / "out", trust_remote_code=True, output_loading_info=True)
        assert type(model).__module__.startswith("transformers_modules.")
        assert isinstance(model, type(expected))
        assert type(model).__name__ == f"SharedAttention{type(expected).__name__}"
        # What a head adds is new in both; what it has no use for, such as a decoder, is left out of both.
        assert info["missing_keys"] == wanted["missing_keys"]
        assert {key for key in wanted["unexpected_keys"] if key in info["unexpected_keys"]} == info["unexpected_keys"]
        assert not info["mismatched_keys"]

        model.save_pretrained(tmp_path / name)
        again = json.loads((tmp_path / name / "config.json").read_text())
        assert again["auto_map"] == config["auto_map"]
        assert again["architectures"] == [type(model).__name__]
        assert auto_class_name(again) in _same(named, config, name)
        assert (tmp_path / name / "modeling_shared_attention.py").exists()


def _same(named, config, name):
    """The auto classes that load the same class."""
    return [other for other in named if config["auto_map"][other] == config["auto_map"][name]]


def _attentions(model, model_type, depths):
    """The attention of each layer in the numbering of maps, None in stacks that this class lacks."""
    found, modules = [], dict(model.named_modules())
    for stack, depth in zip(FAMILIES[model_type].all_stacks, depths, strict=True):
        # Without a head, "model.layers" is "layers".
        ends = (stack.layers, *(() if stack.name else (stack.layers.partition(".")[2],)))
        path = next((name for end in ends for name in modules if f".{name}".endswith(f".{end}")), None)
        layers = modules[path] if path else [None] * depth
        found += [layer and dict(layer.named_modules()).get(stack.attention) for layer in layers]
    return found


@pytest.mark.parametrize(
    ("model_type", "auto_class", "parts"),
    [
        ("qwen3", "AutoModel", [0]),
        ("gpt2", "AutoModel", [0]),
        ("gemma3_text", "AutoModel", [0]),
        ("bert", "AutoModel", [0]),
        ("bert", "AutoModelForTextEncoding", [0]),
        ("t5", "AutoModelForTextEncoding", [0]),
        ("bart", "AutoModelForCausalLM", [1]),
    ],
)
def test_another_class_than_that_of_the_checkpoint_shares_alike(made, model_type, auto_class, parts):
    """parts: the stacks that run, of a T5 its encoder, of a BART its decoder."""
    _, home, rows = made[model_type]
    found = getattr(transformers, auto_class)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    base, info = found.from_pretrained(home / "base", output_loading_info=True, **options)
    model = found.from_pretrained(home / "out", trust_remote_code=True, **options).eval()
    with torch.no_grad():
        for name in info["missing_keys"]:  # what is new in both, a head say, is made anew
            model.get_parameter(name).copy_(base.get_parameter(name))
    base.eval()
    depths = [depth for _, depth in geometry_of_folder(home / "base").stacks or (("", 6),)]
    layers = {layer for part in parts for layer in range(sum(depths[:part]), sum(depths[: part + 1]))}
    ids = torch.randint(3, 120, (2, 15), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        attentions = _attentions(base, model_type, depths)
        with forced(base, attentions, {layer: row for layer, row in rows.items() if layer in layers}):
            expected = base(ids)[0]
        plain, result = base(ids)[0], model(ids)[0]
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "named", "expected"),
    [
        ("T5ForConditionalGeneration", ("AutoModelForPreTraining", "AutoModelForSeq2SeqLM"), "AutoModelForSeq2SeqLM"),
        ("BartForConditionalGeneration", ("AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"), "AutoModelForSeq2SeqLM"),
        ("GPT2LMHeadModel", ("AutoModelForPreTraining", "AutoModelForCausalLM"), "AutoModelForCausalLM"),
        ("BertModel", ("AutoModelForTextEncoding", "AutoModel"), "AutoModel"),
    ],
)
def test_the_tool_takes_the_auto_class_of_the_checkpoint(architecture, named, expected):
    """In whatever order `auto_map` names several for one class: transformers sorts it when it saves."""
    model_type = next(entry for entry in ("t5", "bart", "gpt2", "bert") if architecture.lower().startswith(entry))
    ours = f"SharedAttention{architecture}"
    config = {
        "model_type": f"shared_attention_{model_type}",
        "architectures": [ours],
        "auto_map": {"AutoConfig": "c.C"} | dict.fromkeys(named, f"modeling_shared_attention.{ours}"),
    }
    assert auto_class_name(config) == expected


def test_pipelines(made, tmp_path):
    """Each in a process without sa_convert. What they compute is the model's; that they load it, and say no error."""
    program = (
        "import sys; from transformers import pipeline\n"
        "options = {'trust_remote_code': True, 'device': 'cpu'}\n"
        "for task, folder in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    made = pipeline(task, model=folder, **options)('a quick brown fox')\n"
        "    print(task, type(made).__name__)\n"
        "assert not any(name.startswith('sa_convert') for name in sys.modules)\n"
    )
    jobs = [
        ("feature-extraction", "qwen3"),
        ("text-classification", "qwen3"),
        ("token-classification", "gpt2"),
        ("feature-extraction", "bert"),
        ("text-generation", "gemma3_text"),
    ]
    arguments = [word for task, model_type in jobs for word in (task, str(made[model_type][1] / "out"))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == [task for task, _ in jobs]
    assert "is not supported for" not in result.stderr
