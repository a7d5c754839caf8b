"""Everything beside the weights: configuration, code, tokenizer, and the files that come along."""

import hashlib
import json
import shutil

import pytest

from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.plan import Plan
from sa_convert.errors import UnsupportedModelError
from sa_convert.families.table import FAMILIES
from sa_convert.plan.audited import expected_code
from sa_convert.read.folder import open_folder
from sa_convert.rewrite.config import converted_config
from sa_convert.rewrite.rewrite import needed_bytes, rewrite_checkpoint
from sa_convert.rewrite.tokenizer import tokenizer_config
from sa_convert.treatments.registry import runtime_files
from support.make_checkpoint import tiny_llama

SHARING = Plan({2: {0: {"share": [[1, 0], [1, 1]]}, 1: {"share": [[0, 3], None]}}})


def test_config_changes_four_keys_and_keeps_the_order(tmp_path):
    base = open_folder(tiny_llama(tmp_path / "m"))
    config = converted_config(base, FAMILIES["llama"], SHARING)
    assert list(config) == [*base.config, "auto_map", "shared_attention"]
    changed = {key: value for key, value in config.items() if base.config.get(key) != value}
    assert changed == {
        "model_type": "shared_attention_llama",
        "architectures": ["SharedAttentionLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_shared_attention.SharedAttentionLlamaConfig",
            "AutoModelForCausalLM": "modeling_shared_attention.SharedAttentionLlamaForCausalLM",
            "AutoModel": "modeling_shared_attention.SharedAttentionLlamaModel",
            "AutoModelForQuestionAnswering": "modeling_shared_attention.SharedAttentionLlamaForQuestionAnswering",
            "AutoModelForSequenceClassification": (
                "modeling_shared_attention.SharedAttentionLlamaForSequenceClassification"
            ),
            "AutoModelForTokenClassification": "modeling_shared_attention.SharedAttentionLlamaForTokenClassification",
        },
        "shared_attention": {
            "version": 2,
            "modules": {},
            "layers": {"2": {"0": {"share": [[1, 0], [1, 1]]}, "1": {"share": [[0, 3], None]}}},
        },
    }
    assert base.config["model_type"] == "llama"


def test_the_whole_folder(tmp_path):
    folder = tiny_llama(tmp_path / "m", 2)
    (folder / "templates").mkdir()
    side = {"LICENSE": b"free\r\n", "templates/tool.jinja": b"{{ x }}", "generation_config.json": b'{"a":1}'}
    for name, data in side.items():
        (folder / name).write_bytes(data)
    blob = folder / "vocab.json"
    blob.symlink_to("LICENSE")
    (folder / "LICENSE").chmod(0o400)
    base, out = open_folder(folder), tmp_path / "out"
    out.mkdir()
    edits = {"model.layers.2.self_attn.q_proj.weight": TensorEdit(rows=((24, 32),))}
    written = rewrite_checkpoint(base, FAMILIES["llama"], SHARING, edits, out, runtimes=runtime_files())
    code = ["configuration_shared_attention.py", "modeling_shared_attention.py", "shared_attention_share.py"]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {
        *side, *code, "vocab.json", "config.json", "model.safetensors.index.json", *written.files,
        "tokenizer_config.json",
    }  # fmt: skip
    expected = expected_code(json.loads((out / "config.json").read_text()))
    assert {name: (out / name).read_bytes() for name in code} == expected
    for name, data in side.items():
        assert (out / name).read_bytes() == data
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert all(path.stat().st_mode & 0o600 == 0o600 for path in out.rglob("*"))
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert total < needed_bytes(base, edits) < total + 20_000_000


def test_tied_embeddings_stay_tied(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    base, out = open_folder(tmp_path / "m"), tmp_path / "out"
    out.mkdir()
    assert "lm_head.weight" not in base.tensors
    start = "model.layers.2.self_attn."
    edits = {f"{start}{name}_proj.weight": TensorEdit(rows=()) for name in "qk"}
    sharing = Plan({2: {group: {"share": [[1, 2 * group], [1, 2 * group + 1]]} for group in range(2)}})
    rewrite_checkpoint(base, FAMILIES["llama"], sharing, edits, out, runtimes=runtime_files())
    model, told = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    old, new = base.tensors, open_folder(out).tensors
    assert set(new) == set(old) - set(edits)
    for name, tensor in new.items():
        kept = tensor.file.read_bytes()[tensor.start : tensor.stop]
        was = old[name].file.read_bytes()[old[name].start : old[name].stop]
        assert hashlib.sha256(kept).digest() == hashlib.sha256(was).digest()


def test_our_table_is_that_of_transformers():
    from transformers.models.auto.tokenization_auto import (
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
        TOKENIZER_MAPPING_NAMES,
    )

    plain = {"TokenizersBackend": "PreTrainedTokenizerFast", "MistralCommonBackend": "PreTrainedTokenizerFast"}
    for model_type, family in FAMILIES.items():
        registered = TOKENIZER_MAPPING_NAMES.get(model_type)
        assert family.tokenizer.registered == plain.get(registered, registered), model_type
    overruling = MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS & set(FAMILIES)
    wins = {name for name in overruling if FAMILIES[name].tokenizer.registered != "PreTrainedTokenizerFast"}
    assert wins == {name for name, family in FAMILIES.items() if family.tokenizer.wins}


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    """A byte-level tokenizer that splits in a way of its own, so that rebuilding it by a class's recipe shows."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    merges = [("a", "b"), ("ab", "c"), ("1", "2")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.mark.parametrize("declared", [None, "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_auto_tokenizer_chooses_what_it_chose_for_the_base(tmp_path, tokenizer_json, model_type, declared):
    from transformers import AutoTokenizer

    base_folder = tiny_llama(tmp_path / "base")
    config = json.loads((base_folder / "config.json").read_text())
    architectures = [FAMILIES[model_type].default_class]
    (base_folder / "config.json").write_text(
        # mamba_n_heads: by default it does not fit this small model.
        json.dumps({**config, "model_type": model_type, "architectures": architectures, "mamba_n_heads": 8})
    )
    shutil.copy(tokenizer_json, base_folder)
    content = {"unk_token": "<unk>", "tokenizer_class": declared} if declared else {"unk_token": "<unk>"}
    (base_folder / "tokenizer_config.json").write_text(json.dumps(content))
    base, out = open_folder(base_folder), tmp_path / f"out_{model_type}_{declared}"
    out.mkdir()
    rewrite_checkpoint(base, FAMILIES[model_type], Plan(), {}, out, runtimes=runtime_files())
    declared_now = json.loads((out / "tokenizer_config.json").read_text()).get("tokenizer_class")
    assert declared_now not in (None, "TokenizersBackend"), "transformers 4 could not load it"
    try:
        before = AutoTokenizer.from_pretrained(base_folder)
    except Exception as error:  # the family's class reads unigram vocabularies only, and this one is none
        with pytest.raises(type(error)):
            AutoTokenizer.from_pretrained(out, trust_remote_code=True)
        return
    after = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert type(after) is type(before)
    text = "abc 1212 ab"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert list(after(text)) == list(before(text))


def test_a_tokenizer_that_is_fine_or_absent_is_left_alone(tmp_path):
    folder = tiny_llama(tmp_path / "m")
    assert tokenizer_config(open_folder(folder), FAMILIES["llama"]) is None
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    assert tokenizer_config(open_folder(folder), FAMILIES["llama"]) is None
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["org/name--a.B", null]}}')
    assert tokenizer_config(open_folder(folder), FAMILIES["llama"]) is None
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B", null]}}')
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json names code of its own \('a\.B'"):
        tokenizer_config(open_folder(folder), FAMILIES["llama"])
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert tokenizer_config(open_folder(folder), FAMILIES["llama"]) == {"tokenizer_class": "LlamaTokenizer"}
