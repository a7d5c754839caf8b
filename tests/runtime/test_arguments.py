"""A later transformers may rename what an attention module takes and returns: the carried code holds, or says so.

A class in place of the family's attention class stands for a release. It takes other names, and is called with them.
"""

import inspect
import os
import subprocess
import sys

import pytest
import torch
import transformers

from sa_convert.families.table import FAMILIES
from sa_convert.runtime.modeling_shared_attention import MADE_FOR, unlike
from sa_convert.runtime.shared_attention_special import Arguments
from support.converted_folder import convert_tiny
from support.tiny_models import attentions_of, code_of, tiny_config

CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
# What a reader of the signature still understands.
TELLING = {
    "hidden_states": "inputs",
    **dict.fromkeys(CACHES, "kv_cache"),
    "attention_mask": "visibility_mask",
    "mask": "visibility_mask",
    "position_embeddings": "cos_and_sin_positions",
    "position_ids": "token_position_ids",
    "key_value_states": "source_states",
    "position_bias": "relative_bias",
    "alibi": "alibi_slopes",
    "residual": "residual_stream",
}
# Families that take arguments in every way there is.
FAMILIES_RENAMED = (
    "llama",
    "qwen3",
    "gemma3_text",
    "mixtral",
    "qwen2_moe",
    "stablelm",
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "opt",
    "gptj",
    "falcon",
    "bloom",
    "bert",
    "t5",
    "bart",
    "xglm",
    "qwen3_next",
    "gpt_oss",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = {}

    def make(family, kind="heads"):
        if (family, kind) not in found:
            found[family, kind] = convert_tiny(tmp_path_factory.mktemp(f"{family}-{kind}"), family, kind)
        return found[family, kind]

    return make


def release(monkeypatch, attention: type, names: dict[str, str], returned: int | None = None) -> None:
    """Put a class in place of an attention class that takes these names for its arguments, and is called with them.
    returned: how many values it returns to who calls its forward; the layer around it gets as many as before."""
    original = inspect.signature(attention.forward)
    parameters = [item.replace(name=names.get(item.name, item.name)) for item in original.parameters.values()]
    back = {names.get(name, name): name for name in original.parameters}

    class Renamed(attention):
        def __call__(self, *args, **kwargs):
            kwargs = {names.get(name, name) if name in original.parameters else name: kwargs[name] for name in kwargs}
            return super().__call__(*args, **kwargs)

        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **{back.get(name, name): value for name, value in kwargs.items()})
            return outputs if returned is None else (*outputs, None, None)[:returned]

    Renamed.__name__, Renamed.__module__ = attention.__name__, attention.__module__
    Renamed.forward.__signature__ = original.replace(parameters=parameters)
    module = sys.modules[attention.__module__]
    for name, value in vars(module).copy().items():
        if value is attention:
            monkeypatch.setattr(module, name, Renamed)
        elif isinstance(value, dict) and attention in value.values():
            monkeypatch.setattr(module, name, {key: Renamed if one is attention else one for key, one in value.items()})


def run(model, family):
    """Logits of a batch at once, and of its steps with a cache."""
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (2, 12))
    with torch.no_grad():
        inputs = {"decoder_input_ids": ids.flip(1)} if FAMILIES[family].encoder_decoder else {}
        found = [model(ids, **inputs).logits]
        if model.can_generate() and not FAMILIES[family].modules.bidirectional:
            found.append(model.generate(ids, max_new_tokens=4, do_sample=False, min_new_tokens=4))
    return found


@pytest.mark.parametrize("family", FAMILIES_RENAMED)
def test_renamed_arguments_are_found(made, monkeypatch, family):
    case = made(family)
    expected = run(case.load(), family)
    classes = {type(module) for module in attentions_of(case.base, FAMILIES[family]) if module is not None}
    for attention in classes:
        release(monkeypatch, attention, TELLING)
    model = case.load()
    if FAMILIES[family].modules.special_class:  # the others run their own forward, and name nothing
        modules = [module for module in model.modules() if getattr(module, "plan", None)]
        renamed = {name for module in modules for name in module.arguments.roles.values()}
        assert renamed & set(TELLING.values())
        assert not renamed & set(TELLING)
    for found, wanted in zip(run(model, family), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("family", "name", "role"),
    [
        ("opt", "attention_mask", "mask"),
        ("gpt2", "attention_mask", "mask"),
        ("bert", "attention_mask", "mask"),
        ("gpt_bigcode", "layer_past", "cache"),
        ("bloom", "residual", "residual"),
        ("falcon", "alibi", "alibi"),
        ("bart", "key_value_states", "source"),
        ("t5", "position_bias", "bias"),
        ("qwen2_moe", "position_embeddings", "positions"),
    ],
)
def test_what_is_needed_and_not_found_is_refused_in_a_sentence(made, monkeypatch, family, name, role):
    case = made(family)
    attention = next(type(module) for module in attentions_of(case.base, FAMILIES[family]) if module is not None)
    original = inspect.signature(attention.forward).parameters
    names = {spelling: "thing" for spelling in (CACHES if role == "cache" else (name,)) if spelling in original}
    release(monkeypatch, attention, names)
    changed = getattr(sys.modules[attention.__module__], attention.__name__)
    plain = [
        item.replace(annotation=inspect.Parameter.empty)
        for item in inspect.signature(changed.forward).parameters.values()
    ]
    changed.forward.__signature__ = inspect.Signature(plain)
    with pytest.raises(RuntimeError, match=f"none of which is the {role} in transformers") as caught:
        case.load()
    message = str(caught.value)
    assert "\n" not in message
    assert f"made for transformers {MADE_FOR[0]} to {MADE_FOR[1]}" in message


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_other_returned_values_are_refused_in_a_sentence(made, monkeypatch, family):
    case = made(family)
    attention = next(type(module) for module in attentions_of(case.base, FAMILIES[family]))
    release(monkeypatch, attention, {}, returned=3)
    model = case.load()
    with pytest.raises(RuntimeError, match=f"returns 3 values instead of 2 in transformers .* {MADE_FOR[0]} to"):
        run(model, family)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_on_a_newer_release_any_failure_names_the_releases(made, family):
    """Of a family whose forward is ours, nothing tells how many values its layers expect but that they fail."""
    program = f"""
import torch, transformers
transformers.__version__ = "5.99.0"
name = "{FAMILIES[family].default_class}"
auto = {{"gpt2": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}}["{family}"]
model = getattr(transformers, auto).from_pretrained({str(made(family).folder)!r}, trust_remote_code=True).eval()
inputs = {{"input_ids": torch.arange(3, 9)[None]}}
inputs |= {{"decoder_input_ids": torch.arange(3, 9)[None]}} if "{family}" == "t5" else {{}}
model(**inputs)  # it runs, and then a layer's attention returns one value
for module in model.modules():
    if getattr(module, "plan", None):
        module.forward = lambda *args, **kwargs: (torch.zeros(1),)
try:
    model(**inputs)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "shared_attention: ValueError: not enough values to unpack" in done.stdout
    assert f"in transformers 5.99.0. This checkpoint's code was made for transformers {MADE_FOR[0]} to" in done.stdout


def test_older_spellings_and_unknown_keywords_of_a_caller():
    class Attention:
        def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs): ...

    arguments = Arguments(Attention, ("mask", "cache"), unlike)
    given = arguments.by_name((1, 2), {"past_key_values": 3, "cu_seq_lens_q": 4, "attention_mask": 5})
    assert given == {"hidden_states": 1, "position_embeddings": 2, "attention_mask": 5, "cache": 3, "cu_seq_lens_q": 4}
    call = arguments.by_role({**given, "shared_attention": 6})
    assert (call.states, call.positions, call.mask, call.cache, call.exchange) == (1, 2, 5, 3, 6)
    assert call.rest == {"cu_seq_lens_q": 4}


def test_code_of_a_folder_knows_its_release(made):
    model = made("llama").load()
    assert code_of(model, "modeling_shared_attention").MADE_FOR == MADE_FOR


class PagedCache:
    """Named as that of continuous batching."""


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2_moe", "persimmon"])
def test_the_cache_of_continuous_batching_comes_beside_one_that_is_none(model_type):
    """Until 5.23 it travels to the attention function by its own name, which may be another spelling of a cache's."""
    entry = FAMILIES[model_type]
    model = getattr(transformers, entry.default_class)._from_config(tiny_config(model_type))
    arguments = Arguments(type(attentions_of(model, entry)[0]), ("cache",), unlike)
    name, paged, usual = arguments.roles["cache"], PagedCache(), object()
    other = next(spelling for spelling in CACHES if spelling != name)
    call = arguments.by_role(arguments.by_name((torch.zeros(1, 2, 8),), {name: None, other: paged}))
    assert call.cache is None
    assert call.rest == {other: paged}
    assert arguments.by_role(arguments.by_name((), {other: usual})).cache is usual
