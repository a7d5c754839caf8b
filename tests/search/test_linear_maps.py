"""The linear map of a layer is the least-squares one, and the one that is tried is the one that is written."""

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Calibration
from sa_convert.errors import PlanError
from sa_convert.families.table import FAMILIES
from sa_convert.jobs.converting import ConvertOptions, convert, plan
from sa_convert.observe.session import open_session
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.present.terminal.plan_text import plan_json, render_plan
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.fitting import fit, learn
from sa_convert.treatments.linear.learned import learned
from sa_convert.treatments.linear.maps import STRENGTHS, Moments, fitted
from support.tiny_models import attentions_of, load_converted, save_tiny, save_tokenizer
from support.whole_layers import LENGTH, overruled, recipe_text


def test_the_map_is_that_of_ridge_regression_by_hand():
    chance = numpy.random.default_rng(0)
    inputs, weight = chance.normal(size=(60, 5)) + 2, chance.normal(size=(4, 5))
    outputs = inputs @ weight.T + chance.normal(size=(60, 4)) + 3
    moments, held = Moments(), Moments()
    for part, into in ((slice(0, 40), moments), (slice(40, 60), held)):
        for start in range(part.start, part.stop, 10):
            rows = slice(start, start + 10)
            into.add(torch.tensor(inputs[rows]).float(), torch.tensor(outputs[rows]).float(), 0.5)
    errors, solutions = [], []
    for strength in STRENGTHS:
        # A ridge is least squares with more rows: a multiple of each unit vector, with output 0.
        x = numpy.c_[inputs[:40], numpy.ones(40)]
        penalty = numpy.sqrt(strength * (inputs[:40] ** 2).sum(0).mean())
        x = numpy.r_[x, penalty * numpy.eye(5, 6)]
        y = numpy.r_[outputs[:40], numpy.zeros((5, 4))]
        solution = numpy.linalg.lstsq(x, y, rcond=None)[0]
        errors.append(((numpy.c_[inputs[40:], numpy.ones(20)] @ solution - outputs[40:]) ** 2).sum())
        solutions.append(solution)
    best = solutions[int(numpy.argmin(errors))]
    found = fitted(moments, held)
    numpy.testing.assert_allclose(found.weight.numpy(), best[:-1].T, atol=1e-4)
    numpy.testing.assert_allclose(found.bias.numpy(), best[-1], atol=1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama in whose layer 2 values are nothing but their bias, so that its attention puts out the same always."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny("llama", folder, max_shard_size="10GB")
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def converted(base, folder, layers):
    recipe = parse_recipe(recipe_text(layers), "layers.yaml")
    return convert(str(base), recipe, folder, ConvertOptions(device="cpu"), "layers.yaml")


def test_an_attention_that_is_linear_is_found(base, tmp_path):
    report = converted(base, tmp_path / "out", {2: "linear"})
    assert report.perplexity.increase == pytest.approx(0, abs=1e-4)
    assert converted(base, tmp_path / "dropped", {2: "drop"}).perplexity.increase > 0.001


def test_the_written_recipe_gives_the_same_bytes(base, tmp_path):
    converted(base, tmp_path / "out", {1: "linear", 2: "linear", 4: "drop"})
    again = parse_recipe((tmp_path / "out" / "recipe.yaml").read_text(), "recipe.yaml")
    convert(str(base), again, tmp_path / "again", ConvertOptions(device="cpu", validate=False), "layers.yaml")
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_is_tried_is_what_is_written(base, tmp_path):
    converted(base, tmp_path / "out", {1: "linear", 4: "drop"})
    model = load_converted(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(1))
    wanted = Plan({1: "linear", 4: "drop"})
    with open_session(model_of(open_model(str(base))), Calibration(sequences=6, length=LENGTH)) as session:
        learn(session, wanted)
        written = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in fit(session, wanted).tensors.items():
            assert torch.equal(tensor, written[name])
        with session.probe.trying(wanted), torch.no_grad():
            tried = session.probe.model(tokens, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tried, atol=2e-5, rtol=1e-4)


def test_a_dry_run_knows_the_sizes_before_anything_is_fitted(base):
    found = plan(str(base), parse_recipe(recipe_text({1: "linear"}), "r.yaml"), ConvertOptions())
    hidden, heads = 64, 8 * 16
    gone = (heads + 64 + 64) * hidden + heads * hidden + (heads + 64 + 64) + hidden  # q, k, v, o and biases
    assert found.savings.parameters.before - found.savings.parameters.after == gone - hidden * hidden - hidden
    assert "8 dropped, 0 sliced, 2 added" in render_plan(found)
    start = "model.layers.1.self_attn.linear"
    assert plan_json(found)["tensors"]["added"] == [f"{start}.bias", f"{start}.weight"]


def test_cross_attention_cannot_be_linear(tmp_path):
    save_tiny("bart", tmp_path / "base")
    recipe = parse_recipe("plan: {decoder.cross.1: linear}", "r.yaml")
    with pytest.raises(PlanError, match="attends to what an encoder has read, which no map of its own input knows"):
        plan(str(tmp_path / "base"), recipe, ConvertOptions())


@pytest.mark.parametrize("model_type", ["bloom", "gptj", "falcon", "gpt2", "gemma2"])
def test_every_kind_of_family_is_fitted_and_tried(model_type, tmp_path):
    """Also those whose attention runs by our own code while it is probed, or puts out the residual as well."""
    base = save_tiny(model_type, tmp_path)
    save_tokenizer(tmp_path)
    wanted = Plan({1: "linear", 2: "drop"})
    tokens = torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(1))
    with open_session(model_of(open_model(str(tmp_path))), Calibration(sequences=6, length=LENGTH)) as session:
        learn(session, wanted)
        found = learned().maps[1]
        with session.probe.trying(wanted), torch.no_grad():
            tried = session.probe.model(tokens, use_cache=False).logits
        sequences = [sample.tokens[None] for sample in session.samples.fit]
    seen = []

    def note(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        seen.append((states, output[0] - (args[1] if model_type == "bloom" else 0)))

    handle = attentions_of(base, FAMILIES[model_type])[1].register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        for sequence in sequences:
            base(sequence, use_cache=False)
    handle.remove()
    with torch.no_grad():
        left = sum((output - (states @ found.weight.T + found.bias)).square().sum() for states, output in seen)
        assert left < 0.8 * sum((output - output.mean((0, 1))).square().sum() for _, output in seen)
        with overruled(base, model_type, {1: lambda states: states @ found.weight.T + found.bias, 2: None}):
            torch.testing.assert_close(tried, base(tokens, use_cache=False).logits, atol=2e-5, rtol=1e-4)
