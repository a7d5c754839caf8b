"""The tool finds caches and arguments whatever a release of transformers calls them."""

from inspect import signature

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from sa_convert.errors import SaConvertError
from sa_convert.measure.quality.cache_bytes import cache_bytes_per_token
from sa_convert.measure.quality.decode import decode_check
from sa_convert.measure.speed.runner import Runner
from sa_convert.models.arguments import cache_keyword, cache_of, caches_in, first_argument
from support.tiny_models import save_tiny

# One cache; one with states of fixed size; one that the output does not name; two that consist of two caches.
FAMILIES = ["llama", "qwen3_next", "recurrent_gemma", "t5", "bart"]


def rename(model):
    """Let the model call its cache `memory`, as an argument and in its output."""
    own = type(model)
    theirs = next(name for name in ("cache", "past_key_values") if name in signature(own.forward).parameters)

    class Renamed(own):
        def forward(self, *args, memory: "DynamicCache | None" = None, **kwargs):
            assert theirs not in kwargs
            output = super().forward(*args, **kwargs, **({theirs: memory} if memory is not None else {}))
            return ModelOutput({"memory" if name == theirs else name: value for name, value in output.items()})

    model.__class__ = Renamed
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family, tmp_path):
    return save_tiny(family, tmp_path)


def texts(family):
    torch.manual_seed(6)
    source = torch.randint(3, 128, (11,)) if family in ("t5", "bart") else None
    return torch.randint(3, 128, (12,)), source


def test_cached_decoding(family, model, monkeypatch):
    tokens, source = texts(family)
    generated = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: without_renaming(model, generated, inputs))
    check = decode_check(rename(model), tokens, source=source)
    assert check.max_abs_logit_difference < 1e-4
    assert check.same_greedy_tokens


def without_renaming(model, generate, inputs):
    """transformers' own generate() knows the names of its own release only."""
    renamed = type(model)
    model.__class__ = renamed.__base__
    try:
        return generate(**inputs)
    finally:
        model.__class__ = renamed


def test_bytes(family, model):
    tokens, source = texts(family)
    expected = cache_bytes_per_token(model, tokens, source=source)
    assert expected > 0
    assert cache_bytes_per_token(rename(model), tokens, source=source) == expected


def test_timing(family, model):
    task = "teacher-forced" if family in ("t5", "bart") else "next-token"
    found = []
    for one in (model, rename(model)):
        runner = Runner(one, task, static=False, seed=1)
        with torch.inference_mode():
            runner.begin(6, 2, 2)
            runner.prefill()
            before = runner.cache_bytes()
            runner.step()
        found.append((before, runner.cache_bytes()))
    assert found[0] == found[1]
    assert found[0][1] > found[0][0] > 0


def test_a_static_cache_is_handed_over_under_the_models_name(tmp_path):
    runner = Runner(rename(save_tiny("llama", tmp_path)), "next-token", static=True, seed=1)
    with torch.inference_mode():
        runner.begin(6, 2, 2)
        runner.prefill()
    # 6 layers, keys and values of 2 sequences, 4 groups, 8 tokens, 16 numbers each
    assert runner.cache_bytes() == 6 * 2 * 2 * 4 * 8 * 16 * 4


def test_a_model_without_types_is_asked_for_names_in_use():
    class Untyped:
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            pass

    class HandsOn(Untyped):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Cacheless:
        def forward(self, input_ids, use_cache=None):
            pass

    assert cache_keyword(Untyped()) == "past_key_values"
    assert cache_keyword(HandsOn()) == "past_key_values"
    with pytest.raises(SaConvertError, match="Cacheless takes no cache"):
        cache_keyword(Cacheless())


def test_caches_in():
    inner, cross = DynamicCache(), DynamicCache()
    assert list(caches_in(EncoderDecoderCache(inner, cross))) == [inner, cross]
    assert list(caches_in(inner)) == [inner]
    assert cache_of(ModelOutput(logits=torch.zeros(1))) is None


def test_first_argument():
    class Layer(torch.nn.Module):
        def forward(self, states, mask=None):
            return states

    states, mask = torch.zeros(2), torch.ones(2)
    assert first_argument(Layer(), (states, mask), {}) == (states, None)
    assert first_argument(Layer(), (), {"mask": mask, "states": states}) == (states, "states")
