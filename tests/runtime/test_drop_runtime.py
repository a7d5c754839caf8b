"""A model with layers without attention, or with a linear map for it, trains, is saved and copied like its base."""

import copy
import io

import pytest
import torch

from support.tiny_models import load_converted, save_tiny
from support.whole_layers import convert_layers, overruled

LAYERS = {0: "drop", 2: "linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert_layers(tmp_path_factory.mktemp("llama"), "llama", LAYERS)


@pytest.fixture
def ids():
    return torch.randint(3, 120, (2, 14), generator=torch.Generator().manual_seed(2))


def test_gradients_reach_every_layer_and_the_map(folder, ids):
    model = load_converted(folder).train()
    model(ids, labels=ids).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert wanted["model.layers.2.self_attn.linear.weight"].abs().sum() > 0
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_gradients_are_those_of_the_base(folder, ids, tmp_path):
    """Of the base whose attention is overruled."""
    model, base = load_converted(folder), save_tiny("llama", tmp_path / "base")
    model(ids, labels=ids).loss.backward()
    with overruled(base, "llama", {0: None, 2: model.model.layers[2].self_attn.linear.forward}):
        base(ids, labels=ids).loss.backward()
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, base.get_parameter(name).grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_it_is_saved_and_copied(folder, ids, tmp_path):
    model = load_converted(folder)
    wanted = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_converted(tmp_path / "saved")(ids).logits, wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(ids).logits, wanted)


@torch.no_grad()
def test_half_precision(folder, ids):
    model, exact = load_converted(folder, dtype=torch.bfloat16), load_converted(folder)
    assert model.model.layers[2].self_attn.linear.weight.dtype == torch.bfloat16
    found, wanted = model(ids).logits.float(), exact(ids).logits
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (exact(ids).logits - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_weights_of_the_base_are_refused_by_a_sentence(folder, tmp_path):
    model, base = load_converted(folder), save_tiny("llama", tmp_path / "base")
    with pytest.raises(RuntimeError, match=r"q_proj\.weight does not fit: layer 0 has no attention, which its base"):
        model.load_state_dict(base.state_dict())


@torch.no_grad()
def test_its_first_layers_alone(folder, ids):
    model = load_converted(folder)
    wanted = model(ids, output_hidden_states=True).hidden_states[3]
    from transformers import AutoModelForCausalLM

    short = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_hidden_layers=3)
    found = short(ids, output_hidden_states=True)
    torch.testing.assert_close(found.hidden_states[-1], model.model.norm(wanted))
    assert found.attentions is None


@torch.no_grad()
def test_probabilities_are_those_of_the_layers_that_attend(folder, ids):
    attentions = load_converted(folder, attn_implementation="eager")(ids, output_attentions=True).attentions
    assert [found.shape for found in attentions if found is not None] == [(2, 8, 14, 14)] * 4


@torch.no_grad()
def test_it_runs_in_continuous_batches(folder, ids):
    model = load_converted(folder, attn_implementation="sdpa")
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :].tolist()
    from transformers import GenerationConfig

    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(ids.tolist(), generation_config=options)
    assert [result.generated_tokens for result in found.values()] == wanted
