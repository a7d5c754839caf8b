"""Caches that have a shape, or contents, before a converted model writes to them; quantised caches of odd shapes."""

import inspect

import pytest
import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, cache_utils
from transformers.cache_utils import Cache, QuantizedLayer
from transformers.integrations import executorch

from support.memory_models import MIXED, in_memory, inputs, made

LENGTH = 14
# Rotary with groups, windows in every second layer, sinks, a module of our own, layers without softmax attention.
FAMILIES = {
    "llama": {},
    "gemma2": {"rows": (0, 2, 0, 4)},
    "gpt_oss": {"rows": (0, 2, 0, 4)},
    "gpt2": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "qwen3_next": {"rows": (1, 2, 1, 4)},
}


def cache_name(model):
    """The keyword of this transformers under which a model takes its cache."""
    names = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in names)


@torch.no_grad()
def steps(model, ids, cache, cuts=(5, 6, 7, 10, 14)):
    """Logits of all tokens, some at a time with this cache."""
    logits, start = [], 0
    for stop in cuts:
        logits.append(model(ids[:, start:stop], use_cache=True, **{cache_name(model): cache}).logits)
        start = stop
    return torch.cat(logits, dim=1)


@torch.no_grad()
def whole(model, ids):
    return model(ids, use_cache=False).logits


def text_ids(model, length=LENGTH):
    return inputs(model, length)["input_ids"]


def shape_of(model):
    """Heads that the base caches (Falcon repeats its groups for all query heads), and head size."""
    config = model.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return groups, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize("model_type", FAMILIES)
def test_static_cache_made_early(model_type):
    model = made(model_type, **FAMILIES[model_type])
    ids = text_ids(model)
    cache = StaticCache(config=model.config, max_cache_len=20)
    cache.early_initialization(2, *shape_of(model), torch.float32, ids.device)
    torch.testing.assert_close(steps(model, ids, cache), whole(model, ids), atol=1e-4, rtol=1e-4)
    if model_type in ("llama", "gpt2", "falcon"):  # the library cannot reset mixed layers in place
        cache.reset()
        torch.testing.assert_close(steps(model, ids, cache), whole(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "qwen3_next"])
def test_static_prefill_in_chunks(model_type):
    model = made(model_type, **FAMILIES[model_type])
    ids = text_ids(model)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, use_cache=False, **options)
    found = model.generate(ids, cache_implementation="static", prefill_chunk_size=3, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_export_with_a_static_cache(model_type, strict):
    model = made(model_type, **FAMILIES[model_type])
    ids = text_ids(model)[:1]
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 20}
    program = executorch.convert_and_export_with_cache(model, strict=strict).module()
    found = [program(input_ids=ids[:, at : at + 1], cache_position=torch.tensor([at])) for at in range(LENGTH)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_executorch_wrapper(model_type):
    """Exported for ExecuTorch, with windows a hybrid cache, as far as the window goes."""
    model = made(model_type, **FAMILIES[model_type])
    ids = text_ids(model, 8)[:1]
    model.generation_config.cache_implementation = "static"
    expected = whole(model, ids)
    wrapper = executorch.TorchExportableModuleForDecoderOnlyLM(model, 1, 20)
    given = {"input_ids": ids[:, :1], "cache_position": torch.tensor([0])}
    program = wrapper.export(**given, strict=False).module()
    found = [program(input_ids=ids[:, at : at + 1], cache_position=torch.tensor([at])) for at in range(8)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


class Grouped(QuantizedLayer):
    """Keeps numbers as they are, in groups; as quanto and HQQ do, it refuses what is no multiple of its groups."""

    def _quantize(self, tensor, axis):
        numbers = tensor.numel() // tensor.shape[0]
        if not numbers or numbers % self.q_group_size:
            raise ValueError(f"{numbers} numbers are not groups of {self.q_group_size}")
        return tensor.reshape(-1, self.q_group_size).clone(), tensor.shape

    def _dequantize(self, quantized):
        return quantized[0].reshape(quantized[1])


# SmolLM2-135M's, Qwen2's, one KV group for all, and a head size for which the base itself needs two groups.
GEOMETRIES = {
    "9 heads of 64 in 3 groups": (9, 3, 64),
    "12 heads of 128 in 2 groups": (12, 2, 128),
    "8 heads of 64 in 1 group": (8, 1, 64),
    "8 heads of 32 in 4 groups": (8, 4, 32),
}


def geometry(name):
    heads, groups, size = GEOMETRIES[name]
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size, "hidden_size": heads * size}
    return {**sizes, "heads": heads}


@pytest.mark.parametrize("first", [5, 6])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_quantised_cache_at_any_length(name, first):
    model = made("llama", **geometry(name)).double()
    ids = text_ids(model)
    cache = Cache(layers=[Grouped(residual_length=3) for _ in range(model.config.num_hidden_layers)])
    found = steps(model, ids, cache, cuts=(first, 7, 8, 9, 10, 14))
    torch.testing.assert_close(found, whole(model, ids), atol=1e-4, rtol=1e-4)
    kept = [layer._quantized_keys[0].numel() + layer._quantized_values[0].numel() for layer in cache.layers]
    assert kept[1] == kept[0] // 2, "a layer without keys should keep half"


class Appending(cache_utils.Fp8QuantizedLayer):
    fp8_dtype, fp8_max = torch.float32, 1.0


@pytest.mark.parametrize("model_type", ["llama", "falcon", "gpt2"])
def test_fp8_cache(model_type):
    """A quantised cache of another making, which appends; with so many bits that nothing is lost."""
    model = made(model_type, **FAMILIES[model_type])
    ids = text_ids(model)
    cache = Cache(layers=[Appending() for _ in range(model.config.num_hidden_layers)])
    torch.testing.assert_close(steps(model, ids, cache), whole(model, ids), atol=1e-4, rtol=1e-4)


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=20),
    "quantised": lambda model: Cache(layers=[Grouped() for _ in range(model.config.num_hidden_layers)]),
}
REFUSED = r"^shared_attention: layer [0-4] of this model caches [0-8] heads of keys .* Let this model fill its cache"


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("model_type", ["llama", "falcon", "gpt2"])
def test_a_cache_that_the_base_filled_is_refused(model_type, kind):
    base, model = (made(model_type, share=share, **FAMILIES[model_type]) for share in (False, True))
    ids, cache = text_ids(model), CACHES[kind](base)
    steps(base, ids, cache, cuts=(5,))
    with pytest.raises(ValueError, match=REFUSED):
        steps(model, ids, cache, cuts=(6,))


@pytest.mark.parametrize("model_type", ["llama", "falcon", "gpt2", "bart"])
def test_prefix_tuning_is_refused(model_type):
    model = made(model_type, **FAMILIES.get(model_type, {}))
    task = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    sizes = {} if model_type != "falcon" else {"token_dim": 64, "num_attention_heads": 8, "num_layers": 6}
    tuned = get_peft_model(model, PrefixTuningConfig(task_type=task, num_virtual_tokens=4, **sizes))
    given = inputs(model)
    labels = given.get("decoder_input_ids", given["input_ids"])
    with pytest.raises(ValueError, match=r"^shared_attention: layer"):
        tuned(**given, labels=labels)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
@torch.no_grad()
def test_an_encoder_as_a_decoder_with_the_cache_of_encoder_decoders(model_type):
    names = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM", "electra": "ElectraForCausalLM"}
    model = in_memory(model_type, MIXED, names[model_type], is_decoder=True)
    ids = text_ids(model)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    torch.testing.assert_close(steps(model, ids, cache), whole(model, ids), atol=1e-4, rtol=1e-4)


class Unknown(Cache):
    """A cache of another making: nothing of it is known but `update` and the length."""

    def __init__(self):
        self._held = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        before = self._held.get(layer_idx)
        assert key_states.shape == value_states.shape
        pair = key_states, value_states
        if before is not None:
            pair = tuple(torch.cat([old, new], dim=-2) for old, new in zip(before, pair, strict=True))
        self._held[layer_idx] = pair
        return self._held[layer_idx]

    def get_seq_length(self, layer_idx=0):
        return self._held[layer_idx][0].shape[-2] if layer_idx in self._held else 0

    def get_mask_sizes(self, query_length, layer_idx):
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_query_offset(self, layer_idx=0):
        return self.get_seq_length(layer_idx)

    layers = property(lambda self: [])
    is_compileable = False
    is_sliding = property(lambda self: [False] * 6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon"])
def test_a_cache_of_unknown_making(model_type):
    model = made(model_type, **FAMILIES[model_type])
    ids = text_ids(model)
    torch.testing.assert_close(steps(model, ids, Unknown()), whole(model, ids), atol=1e-4, rtol=1e-4)
