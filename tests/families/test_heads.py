"""Model heads beyond causal language modelling: the class that the base checkpoint's `architectures` names is what the
exported class derives from."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from sa_convert.families.table import FAMILIES
from support.forced_softmax import forced
from support.processes import ROOT, run_cli
from support.tiny_models import geometry_of_folder, load_converted, make_map, save_tokenizer, tiny_config, write_recipe

HEADS = {
    "LlamaModel": ("llama", "AutoModel"),
    "LlamaForSequenceClassification": ("llama", "AutoModelForSequenceClassification"),
    "LlamaForTokenClassification": ("llama", "AutoModelForTokenClassification"),
    "LlamaForQuestionAnswering": ("llama", "AutoModelForQuestionAnswering"),
    "Qwen2ForSequenceClassification": ("qwen2", "AutoModelForSequenceClassification"),
    "GPT2Model": ("gpt2", "AutoModel"),
    "GPT2ForSequenceClassification": ("gpt2", "AutoModelForSequenceClassification"),
    "BertModel": ("bert", "AutoModel"),
    "BertForSequenceClassification": ("bert", "AutoModelForSequenceClassification"),
    "BertForTokenClassification": ("bert", "AutoModelForTokenClassification"),
    "BertForQuestionAnswering": ("bert", "AutoModelForQuestionAnswering"),
    "BertForMultipleChoice": ("bert", "AutoModelForMultipleChoice"),
    "BertForPreTraining": ("bert", "AutoModelForPreTraining"),
    "BertLMHeadModel": ("bert", "AutoModelForCausalLM"),
    "DistilBertForSequenceClassification": ("distilbert", "AutoModelForSequenceClassification"),
    "ModernBertForSequenceClassification": ("modernbert", "AutoModelForSequenceClassification"),
    "T5EncoderModel": ("t5", "AutoModelForTextEncoding"),
    "T5Model": ("t5", "AutoModel"),
    "T5ForSequenceClassification": ("t5", "AutoModelForSequenceClassification"),
    "T5ForTokenClassification": ("t5", "AutoModelForTokenClassification"),
    "BartModel": ("bart", "AutoModel"),
    "BartForSequenceClassification": ("bart", "AutoModelForSequenceClassification"),
    # The classes of language models inside of multimodal ones begin with another name than those that generate.
    "Gemma3TextModel": ("gemma3_text", "AutoModel"),
    "Gemma3TextForSequenceClassification": ("gemma3_text", "AutoModelForSequenceClassification"),
    "Llama4TextModel": ("llama4_text", "AutoModel"),
    "Qwen3_5TextModel": ("qwen3_5_text", "AutoModel"),
    "Qwen3_5TextForSequenceClassification": ("qwen3_5_text", "AutoModelForSequenceClassification"),
    "Qwen3_5MoeTextModel": ("qwen3_5_moe_text", "AutoModel"),
    "CohereCompassTextModel": ("cohere_compass_text", "AutoModel"),
    "CohereCompassTextForSequenceClassification": ("cohere_compass_text", "AutoModelForSequenceClassification"),
}
"""Model class: its model type, and the auto class that loads it."""

CHANGES = {"BertLMHeadModel": {"is_decoder": True}}


@dataclass(frozen=True)
class Converted:
    """A tiny base model in eager mode, its folder, the map in the layers' numbers, and the converted folder."""

    base: torch.nn.Module
    source: Path
    rows: dict
    folder: Path


def attentions(model, entry):
    """The attention module of each layer in the numbering of maps, whatever the model calls its base; None in layers
    without softmax attention."""
    names = {name for name, _ in model.named_modules()}
    found = []
    for stack in entry.all_stacks:
        rest = stack.layers.partition(".")[2]
        path = next(
            (
                path
                for path in (stack.layers, rest, f"transformer.{rest}", f"transformer.{stack.layers}")
                if path in names
            ),
            None,
        )
        if path is not None:
            found += [dict(layer.named_modules()).get(stack.attention) for layer in model.get_submodule(path)]
    return found


def inputs(head):
    """Two sequences, the first padded on the left where tokens see earlier ones only, else on the right."""
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (2, 15))
    mask = torch.ones_like(ids)
    ids[:, -1] = 2  # the end token, by which BART pools
    entry = FAMILIES[HEADS[head][0]]
    if entry.encoder_decoder or entry.modules.bidirectional:
        ids[0, 11], ids[0, 12:], mask[0, 12:] = 2, 0, 0
    else:
        mask[0, :3] = ids[0, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if head in ("T5Model", "BartModel"):
        given["decoder_input_ids"] = ids.flip(1)
    if head == "BertForMultipleChoice":
        given = {name: tensor[None] for name, tensor in given.items()}
    return given


@torch.no_grad()
def outputs(model, head):
    """All that the head gives out, of tokens that are seen."""
    given = inputs(head)
    found = {name: value for name, value in model(**given).items() if isinstance(value, torch.Tensor)}
    assert found
    seen = given["attention_mask"].bool()
    if "decoder_input_ids" in given:
        seen = torch.ones_like(seen)
        found.pop("encoder_last_hidden_state", None)
    return {name: value[seen] if value.shape[:2] == seen.shape else value for name, value in found.items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    made = {}

    def convert(head):
        if head not in made:
            home = tmp_path_factory.mktemp(head)
            model_type = HEADS[head][0]
            torch.manual_seed(0)
            config = tiny_config(model_type, **CHANGES.get(head, {}))
            base = getattr(transformers, head)._from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            base.save_pretrained(home / "base", max_shard_size="100KB")
            assert json.loads((home / "base" / "config.json").read_text())["architectures"] == [head]
            geometry = geometry_of_folder(home / "base")
            rows = make_map("heads", geometry)
            recipe = write_recipe(home / "recipe.json", rows, geometry.stacks)
            result = run_cli("convert", home / "base", "--recipe", recipe, "-o", home / "out", "--no-validate")
            assert result.returncode == 0, result.stderr
            made[head] = Converted(base, home / "base", rows, home / "out")
        return made[head]

    return convert


@pytest.mark.parametrize("head", HEADS)
def test_the_class_derives_from_the_bases_and_shares(converted, tmp_path, head):
    case = converted(head)
    entry = FAMILIES[HEADS[head][0]]
    model = load_converted(case.folder, attn_implementation="eager", dtype=torch.float32)
    assert isinstance(model, type(case.base))
    assert type(model).__name__ == f"SharedAttention{head}"
    named = json.loads((case.folder / "config.json").read_text())["auto_map"]
    assert list(named)[:2] == ["AutoConfig", HEADS[head][1]]
    assert named[HEADS[head][1]] == f"modeling_shared_attention.SharedAttention{head}"

    with forced(case.base, attentions(case.base, entry), case.rows):
        expected = outputs(case.base, head)
    plain = outputs(case.base, head)
    assert max((expected[name] - plain[name]).abs().max() for name in plain) > 1e-3  # the map matters
    found = outputs(model, head)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)

    model.save_pretrained(tmp_path / "again")
    again = load_converted(tmp_path / "again", attn_implementation="eager", dtype=torch.float32)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in outputs(again, head).items():
        # Where tensors lie in memory decides between kernels of experts.
        torch.testing.assert_close(value, found[name], atol=1e-5 if "Moe" in head else 0, rtol=0)


def test_where_sa_convert_is_imported_no_remote_code_is_needed(converted):
    program = (
        "import json, sys; import sa_convert, transformers, torch\n"
        "for head, auto, folder in json.loads(sys.argv[1]):\n"
        "    config = transformers.AutoConfig.from_pretrained(folder)\n"
        "    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)\n"
        "    assert not any(info.values()), (head, info)\n"
        "    assert type(model).__module__.startswith('sa_convert.treated_classes'), type(model)\n"
        "    assert isinstance(model, getattr(transformers, head)), type(model)\n"
        "    print(type(model).__name__)\n"
    )
    cases = [(head, auto, str(converted(head).folder)) for head, (_, auto) in HEADS.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"SharedAttention{head}" for head in HEADS]


@pytest.mark.parametrize("head", ["BertForMaskedLM", "LlamaForImageClassification", "SomethingElse"])
def test_a_class_that_is_none_of_the_family_is_refused(converted, tmp_path, head):
    folder = Path(shutil.copytree(converted("LlamaModel").source, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [head]}))
    result = run_cli("convert", folder, "--recipe", "late-span", "-o", tmp_path / "out", "--no-validate")
    assert result.returncode == 1
    assert result.stderr == (
        f"Error: config.json names the architecture {head}, which is none that sa-convert knows for models of type "
        "'llama' (LlamaForCausalLM is one).\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["LlamaForSequenceClassification", "BertModel", "T5EncoderModel"])
def test_validation_needs_a_head_for_language(converted, tmp_path, head):
    folder = Path(shutil.copytree(converted(head).source, tmp_path / "model"))
    save_tokenizer(folder)
    result = run_cli("convert", folder, "--recipe", "late-span", "-o", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert f"{head} has no language-modelling head, which perplexity needs: use --no-validate" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
