"""What users do with a converted model: threads, training, padding, every way to generate, saving and loading again."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from sa_convert.models.arguments import cache_of
from support.forced_attention import forced_attention
from support.processes import ROOT, run_cli
from support.tiny_models import geometry_of_folder, load_converted, make_map, save_tiny, with_cache, write_recipe

# SDPA with groups of two heads and MHA, eager only with two attention types, our own forward, and sinks.
CASES = [
    ("llama", "span"),
    ("llama", "groups"),
    ("llama", "heads"),
    ("opt", "heads"),
    ("gemma2", "span"),
    ("gemma2", "heads"),
    ("stablelm", "heads"),
    ("gpt_oss", "groups"),
]


class Case:
    def __init__(self, folder, model_type, kind):
        self.base = save_tiny(model_type, folder / "base")
        self.rows = make_map(kind, geometry_of_folder(folder / "base"), seed=1)
        self.folder = folder / "out"
        recipe = write_recipe(folder / "recipe.json", self.rows)
        result = run_cli("convert", folder / "base", "--recipe", recipe, "-o", self.folder, "--no-validate")
        assert result.returncode == 0, result.stderr
        torch.manual_seed(2)
        self.ids = torch.randint(3, 128, (2, 24))

    def load(self, **options):
        return load_converted(self.folder, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(model_type, kind):
        key = model_type, kind
        if key not in made:
            made[key] = Case(tmp_path_factory.mktemp(f"{model_type}-{kind}"), *key)
        return made[key]

    return case


@pytest.fixture(params=CASES, ids=lambda pair: "-".join(pair))
def case(request, cases):
    return cases(*request.param)


def tensors_in_attributes(model):
    """Names of module attributes that hold a tensor which is no parameter or buffer, at any depth."""

    def holds(value, depth=0):
        if isinstance(value, torch.Tensor):
            return True
        if depth > 4 or isinstance(value, torch.nn.Module):
            return False
        if isinstance(value, dict):
            return any(holds(item, depth + 1) for item in value.values())
        if isinstance(value, list | tuple | set):
            return any(holds(item, depth + 1) for item in value)
        return hasattr(value, "__dict__") and not isinstance(value, type) and holds(vars(value), depth + 1)

    registered = {"_parameters", "_buffers", "_modules"}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in registered and holds(value):
                yield f"{name}.{key}"


def test_no_tensors_stay_on_modules(case):
    model = case.load()
    before = set(tensors_in_attributes(model))
    model(case.ids)
    model.generate(case.ids, max_new_tokens=3, do_sample=False)
    assert set(tensors_in_attributes(model)) == before


@torch.no_grad()
def test_threads_do_not_meet(case):
    model = case.load()
    inputs = [torch.randint(3, 128, (1, 9 + size)) for size in range(6)]
    expected = [model(ids, use_cache=False).logits for ids in inputs]
    wrong, gate = [], threading.Barrier(len(inputs))

    def work(number):
        gate.wait()
        for _ in range(8):
            with torch.no_grad():
                logits = model(inputs[number], use_cache=False).logits
            if not torch.allclose(logits, expected[number], atol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients(case):
    """As autograd through the base with forced attention, with and without gradient checkpointing, in every tensor."""
    expected_model = copy.deepcopy(case.base).eval()
    with forced_attention(expected_model, case.rows):
        expected = gradients(expected_model, case.ids)
    model = case.load().eval()
    plain = gradients(model, case.ids)
    # In eval mode no dropout; checkpointing only happens in training mode, and no tiny model has dropout in attention.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attention_dropout", "layerdrop"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.train()
    model.gradient_checkpointing_enable()
    calls = []
    attentions = [module for module in model.modules() if hasattr(module, "v_proj")]
    attentions[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, case.ids)
    assert len(calls) == 2, "attention of the last layer should be computed twice"
    assert set(plain) == set(checkpointed) == {name for name, _ in model.named_parameters()}
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
        if gradient.shape == expected[name].shape and ".norms." not in name:  # norms of single heads move up
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_reentrant_checkpointing_is_refused(cases):
    model = cases("llama", "span").load()
    for enable in (model.gradient_checkpointing_enable, model.activation_checkpointing_enable):  # 5.x: the new name
        with pytest.raises(ValueError, match="use_reentrant"):
            enable({"use_reentrant": True})


@torch.no_grad()
def test_padding_on_either_side(case):
    model = case.load()
    ids = case.ids[:1, :16]
    alone = model(ids, use_cache=False).logits[0]
    padding = torch.zeros(1, 5, dtype=torch.long)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(padding)
    left_mask = torch.cat([zeros, ones], 1)
    positions = (left_mask.cumsum(-1) - 1).clamp(min=0)
    left = model(torch.cat([padding, ids], 1), attention_mask=left_mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(left.logits[0, 5:], alone, atol=1e-4, rtol=1e-4)
    right = model(torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, zeros], 1), use_cache=False)
    torch.testing.assert_close(right.logits[0, :16], alone, atol=1e-4, rtol=1e-4)


def test_batch_equals_single(case):
    model = case.load()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = model.generate(case.ids, attention_mask=torch.ones_like(case.ids), **options)
    single = [model.generate(row[None], attention_mask=torch.ones_like(row[None]), **options)[0] for row in case.ids]
    assert torch.equal(batch, torch.stack(single))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}]
)
def test_generation_with_cache_equals_without(case, options):
    model = case.load()
    ids = case.ids[:1] if "prompt_lookup_num_tokens" in options else case.ids
    common = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    reference = {key: value for key, value in options.items() if key == "num_beams"}
    expected = model.generate(ids, use_cache=False, **common, **reference)
    assert torch.equal(model.generate(ids, **common, **options), expected)


def test_assisted_generation(case):
    """The converted model with its base as assistant, and the other way round."""
    model, ids = case.load(), case.ids[:1]
    common = {"max_new_tokens": 10, "do_sample": False}
    for target, assistant in ((model, case.base), (case.base, model)):
        assert torch.equal(target.generate(ids, assistant_model=assistant, **common), target.generate(ids, **common))


@torch.no_grad()
def test_several_turns_with_one_cache(case):
    """A conversation: prompt, then more tokens at once, then one by one."""
    model, ids = case.load(), case.ids
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :7], use_cache=True)
    second = model(ids[:, 7:15], **with_cache(model, cache_of(first)))
    third = model(ids[:, 15:16], **with_cache(model, cache_of(second)))
    logits = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(logits, whole[:, :16], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_output_attentions(case):
    model = case.load(attn_implementation="eager")
    attentions = model(case.ids, output_attentions=True, use_cache=False).attentions
    assert len(attentions) == model.config.num_hidden_layers
    for layer, row in case.rows.items():
        assert attentions[layer].shape == (2, len(row), 24, 24)
        for head, source in enumerate(row):
            if source is not None:
                assert torch.equal(attentions[layer][:, head], attentions[source[0]][:, source[1]])


@torch.no_grad()
def test_changing_the_attention_implementation(case):
    model = case.load()
    if not case.base._supports_sdpa:
        pytest.skip("the family has eager attention only")
    model.set_attn_implementation("sdpa")
    sdpa = model(case.ids, use_cache=False).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(case.ids, use_cache=False).logits, sdpa, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_save_and_load_again(case, tmp_path):
    model = case.load()
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    for file in case.folder.glob("*.py"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    again = load_converted(tmp_path / "again")
    assert again.config.shared_attention == model.config.shared_attention
    assert torch.equal(again(case.ids, use_cache=False).logits, model(case.ids, use_cache=False).logits)


@torch.no_grad()
def test_deepcopy_is_independent(cases):
    case = cases("llama", "groups")
    model = case.load()
    expected = model(case.ids, use_cache=False).logits
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(case.ids, use_cache=False).logits, expected)


def test_config_can_be_pickled(cases):
    config = cases("llama", "span").load().config
    assert pickle.loads(pickle.dumps(config)).shared_attention == config.shared_attention


@pytest.mark.parametrize(
    "first", ["import sa_convert", "from transformers import Gemma3TextConfig", "import transformers"]
)
def test_importing_sa_convert_registers_the_types(cases, first, tmp_path):
    """No remote code then; and save_pretrained still writes the code."""
    program = f"""
{first}
import sa_convert
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(cases("llama", "heads").folder)!r})
assert type(model).__module__ == "sa_convert.treated_classes", type(model)
model.save_pretrained({str(tmp_path / "again")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert type(load_converted(tmp_path / "again")).__name__ == "SharedAttentionLlamaForCausalLM"


def test_broken_map_is_refused_at_load(cases, tmp_path):
    """Someone edits config.json so that a source reuses another head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(cases("llama", "span").folder, trust_remote_code=True)
    rows = {"2": {str(group): {"share": [[1, 0]] * 2} for group in range(4)}}
    rows["1"] = {str(group): {"share": [[0, 0]] * 2} for group in range(4)}
    config.shared_attention = {"version": 2, "layers": rows}
    with pytest.raises(ValueError, match="layer 2 head 0 reuses layer 1 head 0, which is not an own head"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for other, said in (
        ({"layers": {"2": [[1, 0]] * 8}}, "is not of version 2"),
        ({"version": 2, "layers": {"2": {"0": {"window": {}}}}}, "layer 2: this checkpoint has no code for window"),
        ({"version": 2, "layers": {"2": {"4": {"share": [[1, 0]] * 2}}}}, "layer 2 lists 2 heads in KV group 4"),
        ({"version": 2, "layers": {"encoder.2": {}}}, "the model has no layer encoder.2"),
    ):
        config.shared_attention = other
        with pytest.raises(ValueError, match=f"shared_attention: .*{said}"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=True)
