"""What transformers chooses by the model type, it chooses for a converted folder as for its base."""

import importlib.machinery
import inspect
import json
import re
import shutil
import sys
import types

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from sa_convert.domain.plan import Plan
from sa_convert.families.table import FAMILIES
from sa_convert.read.family_of import family_of
from sa_convert.read.folder import open_folder
from sa_convert.rewrite.processor import IMAGES, PROCESSOR
from sa_convert.rewrite.rewrite import rewrite_checkpoint
from sa_convert.treatments.registry import runtime_files
from support.cli_cases import edit_json
from support.make_checkpoint import tiny_llama
from support.processes import run_cli

MISTRAL_COMMON = [name for name, family in FAMILIES.items() if family.tokenizer.mistral_common]

DIGITS = r"\p{N}{1,3}|[^\p{N}]+"
TEXT = "12 goats, 345 boats"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A tokenizer of more than 100,000 tokens in which pairs of digits are tokens; split rightly, they stand alone."""
    folder = tmp_path_factory.mktemp("large")
    pairs = [(a, b) for a in "0123456789" for b in "0123456789"]
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    words += [f"word{number}" for number in range(100_010 - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=pairs))
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(DIGITS), "isolated"), levels])
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def converted(base, out):
    checkpoint = open_folder(base)
    out.mkdir()
    rewrite_checkpoint(checkpoint, family_of(checkpoint.config), Plan(), {}, out, runtimes=runtime_files())
    return out


def base_folder(folder, tokenizer, model_type, version, declared="LlamaTokenizerFast", **changes):
    tiny_llama(folder)
    config = {"model_type": model_type, "architectures": [], "transformers_version": version, **changes}
    edit_json(folder / "config.json", **{key: value for key, value in config.items() if value is not None})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class=declared)
    return folder


LAYERS = {"layer_types": ["full_attention"] * 4}


@pytest.mark.parametrize(
    ("model_type", "version", "changes", "corrects"),
    [
        ("mistral", "4.56.2", {}, True),
        ("mistral", None, {}, True),
        ("mistral", "5.1.0", {}, False),
        ("mistral", "4.56.2", LAYERS, True),  # a Ministral for transformers
        ("ministral", "4.57.0", {}, False),
        ("mixtral", "4.56.2", {}, False),
        ("llama", "4.56.2", {}, False),
    ],
)
@pytest.mark.parametrize("declared", [None, True])
def test_fix_mistral_regex(tmp_path, large, model_type, version, changes, corrects, declared):
    name = f"{model_type}-{version}-{len(changes)}-{declared}"
    base = base_folder(tmp_path / "base", large, model_type, version, **changes)
    if declared:
        edit_json(base / "tokenizer_config.json", fix_mistral_regex=True)
    out = converted(base, tmp_path / name.replace(".", "_"))
    seen = set()
    for options in ({}, {"fix_mistral_regex": True}, {"fix_mistral_regex": False}):
        expected = AutoTokenizer.from_pretrained(base, **options)(TEXT).input_ids
        assert AutoTokenizer.from_pretrained(out, trust_remote_code=True, **options)(TEXT).input_ids == expected, (
            options
        )
        seen.add(tuple(expected))
    # So that the test cannot pass by correcting nothing.
    if model_type == "mistral":
        assert (len(seen) == 2) == corrects
    plain = AutoTokenizer.from_pretrained(out)(TEXT).input_ids
    assert plain == AutoTokenizer.from_pretrained(base, fix_mistral_regex=False)(TEXT).input_ids


class ByMistral:
    """Stands for the tokenizer of mistral-common, which tests do not install."""

    @classmethod
    def from_pretrained(cls, name, **options):
        assert "trust_remote_code" not in options
        return cls()


@pytest.mark.parametrize("version", ["4.56.2", "5.1.0"])
@pytest.mark.parametrize("model_type", MISTRAL_COMMON)
def test_tekken(tmp_path, large, monkeypatch, model_type, version):
    base = base_folder(tmp_path / "base", large, model_type, version)
    (base / "tekken.json").write_text("{}")
    out = converted(base, tmp_path / f"{model_type}-{version[0]}")
    assert (out / "tekken.json").exists()
    without = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert without(TEXT).input_ids == AutoTokenizer.from_pretrained(base)(TEXT).input_ids
    installed = types.ModuleType("mistral_common")
    installed.__spec__ = importlib.machinery.ModuleSpec("mistral_common", None)
    monkeypatch.setitem(sys.modules, "mistral_common", installed)
    # The module that code of models imports; the first import of it may have returned another object.
    monkeypatch.setattr(sys.modules["transformers"], "MistralCommonBackend", ByMistral, raising=False)
    assert type(AutoTokenizer.from_pretrained(out, trust_remote_code=True)) is ByMistral
    fixed = AutoTokenizer.from_pretrained(out, trust_remote_code=True, fix_mistral_regex=True)
    assert fixed(TEXT).input_ids == AutoTokenizer.from_pretrained(base, fix_mistral_regex=True)(TEXT).input_ids
    assert isinstance(AutoTokenizer.from_pretrained(out), PreTrainedTokenizerFast)


def test_other_types_ignore_tekken(tmp_path, large):
    base = base_folder(tmp_path / "base", large, "llama", "4.56.2")
    (base / "tekken.json").write_text("{}")
    out = converted(base, tmp_path / "llama_out")
    assert not (out / "tokenization_mistral.py").exists()
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())


def test_the_types_are_those_of_transformers():
    from transformers.models.auto import tokenization_auto

    source = inspect.getsource(tokenization_auto)
    assert set(MISTRAL_COMMON) == set(re.findall(r'"(\w+)",\s+"MistralCommonBackend"', source)) & set(FAMILIES)


def test_the_tokenizer_code_is_ours_for_evaluate_and_push(tmp_path, large):
    from sa_convert.plan.audited import foreign_code

    out = converted(base_folder(tmp_path / "base", large, "mistral", None), tmp_path / "ours")
    assert foreign_code(open_folder(out)) is None
    (out / "tokenization_mistral.py").write_text("print('other')")
    assert "tokenization_mistral.py is not what this version of sa-convert writes" in str(
        foreign_code(open_folder(out))
    )
    edit_json(out / "config.json", auto_map={"AutoConfig": "tokenization_mistral.TekkenTokenizer"})
    assert foreign_code(open_folder(out)) is not None


def test_processor_classes_are_those_of_transformers():
    from transformers.models.auto import video_processing_auto
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    # The table itself is empty where torchvision is not installed.
    videos = dict(re.findall(r'\("(\w+)", \{"torchvision": "(\w+)"', inspect.getsource(video_processing_auto)))
    assert len(videos) > 10
    tables = {"main": PROCESSOR_MAPPING_NAMES, "images": IMAGE_PROCESSOR_MAPPING_NAMES, "videos": videos}
    for model_type, family in FAMILIES.items():
        for kind, table in tables.items():
            registered = table.get(model_type)
            if isinstance(registered, dict):
                registered = registered.get("torchvision")
            assert getattr(family.processor, kind) == registered, (model_type, kind)


PARTS = {
    PROCESSOR: {"image_seq_length": 4},
    IMAGES: {"do_resize": True, "size": {"height": 28, "width": 28}},
    "tokenizer_config.json": {"model_max_length": 64},
}


@pytest.mark.parametrize("present", [(IMAGES,), (PROCESSOR, IMAGES), ()])
def test_auto_processor_returns_the_class_of_the_base(tmp_path, large, present, monkeypatch):
    """Gemma 3 without processor_class in any file, and without the class of its image processor."""
    from support.tiny_models import save_tiny

    base = tmp_path / "base"
    save_tiny("gemma3", base)
    shutil.copy(large / "tokenizer.json", base)
    (base / "tokenizer_config.json").write_text(json.dumps(PARTS["tokenizer_config.json"]))
    for name in present:
        (base / name).write_text(json.dumps(PARTS[name]))
    out = converted(base, tmp_path / f"gemma_{len(present)}")
    asked = []
    for folder in (base, out):
        monkeypatch.setattr(
            transformers.Gemma3Processor,
            "from_pretrained",
            classmethod(lambda cls, name, *args, **options: asked.append((cls.__name__, str(name)))),
        )
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert asked == [("Gemma3Processor", str(base)), ("Gemma3Processor", str(out))]
    if IMAGES in present:
        content = json.loads((out / IMAGES).read_text())
        assert content["image_processor_type"] == "Gemma3ImageProcessor"
        assert {key: content[key] for key in PARTS[IMAGES]} == PARTS[IMAGES]


@pytest.mark.parametrize("file", [PROCESSOR, IMAGES, "tokenizer_config.json"])
def test_a_processor_that_is_named_is_left_alone(tmp_path, file):
    from support.tiny_models import save_tiny

    base = tmp_path / "base"
    save_tiny("gemma3", base)
    for name, content in PARTS.items():
        (base / name).write_text(json.dumps(content))
    edit_json(base / file, processor_class="OtherProcessor")
    edit_json(base / IMAGES, image_processor_type="OtherImageProcessor")
    out = converted(base, tmp_path / "out")
    for name in (PROCESSOR, IMAGES):
        assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_for_generate_is_left_out_and_said(base, tmp_path, trusted):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise RuntimeError('ran')")
    (folder / "custom_generate" / "requirements.txt").write_text("torch")
    options = ["--trust-remote-code"] if trusted else []
    result = run_cli("convert", folder, "--recipe", "late-span", "-o", tmp_path / "out", "--no-validate", *options)
    assert result.returncode == 0, result.stderr
    assert "custom_generate/, code of the model's own for generate(), is left out" in result.stderr
    assert not (tmp_path / "out" / "custom_generate").exists()
