"""Language models inside of multimodal ones: sharing there and nowhere else, with images and without."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from sa_convert.families.table import FAMILIES
from support.forced_softmax import forced
from support.processes import ROOT, run_cli
from support.tiny_models import attentions_of, geometry_of_folder, make_map, tiny_config, write_recipe

IMAGE = 120  # the token in whose place an image's features stand
TYPES = {"gemma3": ("image_token_index",), "qwen2_5_vl": ("image_token_id",)}
TOKENS = {"boi_token_index": 121, "eoi_token_index": 122, "video_token_id": 123, "vision_start_token_id": 124}
OLD_NAMES = {
    "gemma3": r"language_model\.model\.layers|vision_tower|multi_modal_projector",
    "qwen2_5_vl": r"model\.layers|visual",
}
NEW_NAMES = {
    "gemma3": r"model\.(language_model\.layers|vision_tower|multi_modal_projector)",
    "qwen2_5_vl": r"model\.(language_model\.layers|visual)",
}
SIDE_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def save_base(model_type, folder, layout):
    """A tiny random model with its tensors named as in the Hub's checkpoints ("old"), or as its modules ("new")."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    for name, token in {**dict.fromkeys(TYPES[model_type], IMAGE), **TOKENS}.items():
        if hasattr(config, name):
            setattr(config, name, token)
    model = getattr(transformers, FAMILIES[model_type].default_class)
    model = model._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if layout == "new":
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.lm_head.weight is model.get_input_embeddings().weight:
            del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    names = OLD_NAMES if layout == "old" else NEW_NAMES
    assert any(re.match(names[model_type], name) for name in tensors_in(folder))
    for name in SIDE_FILES:
        # They name their classes: see test_chosen_by_type for those that do not.
        named = {"processor_class": "P", "image_processor_type": "I", "video_processor_type": "V"}
        (folder / name).write_text(json.dumps({"file": name, **named}))
    return model


def tensors_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def image_inputs(model_type):
    """Two sequences, each of text around an image of four tokens."""
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (2, 19))
    ids[:, 5:9] = IMAGE
    kinds = (ids == IMAGE).long()
    if model_type == "gemma3":
        return {"input_ids": ids, "token_type_ids": kinds, "pixel_values": torch.randn(2, 3, 28, 28)}
    return {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 14 * 14),  # patches of two frames
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


@pytest.fixture(scope="module", params=[(kind, layout) for kind in TYPES for layout in ("old", "new")], ids="-".join)
def case(request, tmp_path_factory):
    """Model type, base model in eager mode, its folder, the map in the layers' numbers, and the converted folder."""
    model_type, layout = request.param
    home = tmp_path_factory.mktemp(model_type)
    base = save_base(model_type, home / "base", layout)
    rows = make_map("heads", geometry_of_folder(home / "base"))
    recipe = write_recipe(home / "recipe.json", rows)
    result = run_cli("convert", home / "base", "--recipe", recipe, "-o", home / "out", "--no-validate")
    assert result.returncode == 0, result.stderr
    return model_type, base, home / "base", rows, home / "out"


def load(folder, auto_class, **options):
    found = getattr(transformers, auto_class)
    model, info = found.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def test_all_else_is_the_bases_byte_for_byte(case):
    model_type, _, source, rows, folder = case
    before, after = tensors_in(source), tensors_in(folder)
    # Queries and keys of the language model's layers that share; norms of queries and keys go with them.
    layers = OLD_NAMES[model_type].partition("|")[0] + r"|model\.language_model\.layers"
    shared = re.compile(rf"({layers})\.({'|'.join(map(str, rows))})\.self_attn\.[qk]_(proj|norm)\.")
    touched = {name for name in before if shared.match(name)}
    assert touched
    assert before.keys() - touched <= after.keys() <= before.keys()
    for name in before.keys() - touched:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    assert sum(after[name].numel() if name in after else 0 for name in touched) < sum(
        before[name].numel() for name in touched
    )
    for name in SIDE_FILES:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    named = list(config["auto_map"])
    assert named[:3] == ["AutoConfig", "AutoModelForImageTextToText", "AutoModelForCausalLM"]
    assert {"AutoModel", "AutoModelForMultimodalLM"} < set(named)
    base_config = json.loads((source / "config.json").read_text())
    assert {key: config[key] for key in ("text_config", "vision_config")} == {
        key: base_config[key] for key in ("text_config", "vision_config")
    }


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_it_sees_images(case, kernel):
    model_type, base, _, rows, folder = case
    inputs = image_inputs(model_type)
    with torch.no_grad():
        plain = base(**inputs, use_cache=False).logits
        blind = base(**{**inputs, "pixel_values": -inputs["pixel_values"]}, use_cache=False).logits
        with forced(base, attentions_of(base, FAMILIES[model_type]), rows):
            expected = base(**inputs, use_cache=False).logits
    assert (expected - plain).abs().max() > 1e-3  # the map matters
    assert (blind - plain).abs().max() > 1e-3  # and so does the image
    model = load(folder, "AutoModelForImageTextToText", attn_implementation=kernel)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


def test_it_generates_from_text_alone(case, tmp_path):
    model_type, base, _, rows, folder = case
    torch.manual_seed(2)
    ids = torch.randint(3, 100, (2, 13))
    with torch.no_grad(), forced(base, attentions_of(base, FAMILIES[model_type]), rows):
        expected = base(ids, use_cache=False).logits
    model = load(folder, "AutoModelForCausalLM", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 10, "do_sample": False}
    plain = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), plain)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", "AutoModelForCausalLM", attn_implementation="eager")
    assert torch.equal(again.generate(ids, **options), plain)


@pytest.mark.parametrize("case", [(kind, "old") for kind in TYPES], ids="-".join, indirect=True)
def test_where_sa_convert_is_imported_no_remote_code_is_needed(case):
    _, base, _, _, folder = case
    program = (
        "import sys; import sa_convert, transformers\n"
        "for auto in ('AutoModelForImageTextToText', 'AutoModelForCausalLM'):\n"
        "    model, info = getattr(transformers, auto).from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "    assert not any(info.values()), info\n"
        "    print(type(model).__module__, type(model).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    name = f"SharedAttention{type(base).__name__}"
    assert result.stdout.splitlines() == [f"sa_convert.treated_classes {name}"] * 2


def test_only_the_language_model_is_described(case):
    content = json.loads(run_cli("inspect", case[2], "--json").stdout)
    assert content["layers"] == 6
    assert content["sharing"]["total_groups"] == 6 * 4
    kinds = {kind["attention"]: kind["layers"] for kind in content["sharing"]["kinds"]}
    if case[0] == "gemma3":
        assert kinds == {"sliding_attention": [0, 1, 2, 3, 4], "full_attention": [5]}
    else:
        assert kinds == {"full_attention": [0, 1, 2, 3, 4, 5]}
    # Keys and values of 4 groups in 6 layers, in float32: nothing of the vision tower.
    head_dim = content["head_dim"]
    assert content["cache_bytes_per_token"] == 2 * 6 * 4 * head_dim * 4
