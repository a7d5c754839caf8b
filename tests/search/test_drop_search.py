"""A search that may take whole layers' attention away, or make it linear, finds the layers where that costs nothing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Calibration
from sa_convert.jobs.converting import ConvertOptions, plan
from sa_convert.observe.session import open_session
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.fitting import learn
from sa_convert.search.rounds import State
from sa_convert.search.scoring import collect
from sa_convert.treatments.registry import searched
from support.tiny_models import save_tiny, save_tokenizer
from support.whole_layers import overruled

SEARCH = """
search: {{cache: {part}%, at: 32}}
treatments: [{treatments}]
calibration: {{sequences: 6, length: 32}}
gate: {{max_perplexity_increase: 90%}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama in which the attention of layer 4 puts out nothing."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny("llama", folder, max_shard_size="10GB", attention_bias=False)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.self_attn.o_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def found(base, treatments, part=16):
    recipe = parse_recipe(SEARCH.format(treatments=treatments, part=part), "search.yaml")
    return plan(str(base), recipe, ConvertOptions(device="cpu"))


@pytest.mark.parametrize("treatments", ["drop", "linear", "share, drop"])
def test_a_layer_that_does_nothing_goes(base, treatments):
    conversion = found(base, treatments)
    assert conversion.plan == Plan({4: treatments.split(", ")[-1]})
    before, after = conversion.savings.cache_bytes_per_token.before, conversion.savings.cache_bytes_per_token.after
    assert (before - after) / before == pytest.approx(1 / 6)


def test_some_layer_of_a_stack_keeps_its_attention(base):
    conversion = found(base, "drop", part=83)
    assert len(conversion.plan.layers_of("drop")) == 5


def test_costs_are_those_of_gradients_at_the_attentions_output(base):
    """The cost of a layer without attention: half the mean square of what its output is along the gradient there."""
    model = model_of(open_model(str(base)))
    with open_session(model, Calibration(sequences=6, length=32), treatments=searched(["drop", "linear"])) as session:
        learn(session, None)
        samples = [sample for sample in session.samples.fit if not sample.repetition][:1]
        ledgers = collect(session.probe, session.units, samples, Plan(), session.treatments)
        inputs = samples[0].tokens[None]
        outputs, states = {}, {}

        def keep(number):
            def hook(module, args, kwargs, output):
                states[number] = kwargs["hidden_states"].detach()
                outputs[number] = output[0].detach().requires_grad_(True)
                return (outputs[number], *output[1:])

            return hook

        run = session.probe.model
        handles = [
            layer.self_attn.register_forward_hook(keep(number), with_kwargs=True)
            for number, layer in enumerate(run.model.layers)
        ]
        chances = run(inputs, use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        # Each layer was cut off from those before it: the gradient at its output is that through all later layers.
        drawn = torch.multinomial(chances.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
        count = len(samples[0].tokens) - 1
        loss = -chances.gather(1, drawn)[:count].sum()
        (gradient,) = torch.autograd.grad(loss, [outputs[5]])
        wanted = 0.5 * ((outputs[5] * gradient).sum(-1) ** 2).sum().item() / count
        assert ledgers["drop"].costs[5] == pytest.approx(wanted, rel=1e-3)
        from sa_convert.treatments.linear.learned import learned

        change = learned().maps[5].of(states[5]) - outputs[5]
        wanted = 0.5 * ((change * gradient).sum(-1) ** 2).sum().item() / count
        assert ledgers["linear"].costs[5] == pytest.approx(wanted, rel=1e-2)
        assert ledgers["drop"].cost(5) == pytest.approx(1.4 * ledgers["drop"].costs[5])


def test_what_a_layer_has_is_given_back_whole(base):
    model = model_of(open_model(str(base)))
    with open_session(model, Calibration(sequences=6, length=32), treatments=searched(["drop"])) as session:
        ledgers = collect(session.probe, session.units, session.samples.fit[:2], Plan({2: "drop"}), session.treatments)
        state = State(ledgers, Plan({2: "drop"}))
        assert state.advance()
        (layer,) = set(state.plan.layers_of("drop")) - {2}
        accepted = {unit: offer for unit, offer in state.chosen.items() if unit.layer == 2}
        state.undo(next(unit for unit in state.chosen if unit.layer == layer), accepted)
        assert state.plan == Plan({2: "drop"})
        assert not any(layer in {unit.layer for unit in move.offers} and state._may(move) for move in _moves(state))


def _moves(state):
    return [move for ledger in state.ledgers.values() for move in ledger.moves(state)]


def test_a_tried_plan_is_the_base_with_that_output_at_zero(base):
    reference = save_tiny("llama", base.parent / "other", attention_bias=False)
    tokens = torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(1))
    model = model_of(open_model(str(base)))
    with open_session(model, Calibration(sequences=6, length=32)) as session:
        reference.load_state_dict(session.probe.model.state_dict())
        with session.probe.trying(Plan({0: "drop", 3: "drop"})), torch.no_grad():
            tried = session.probe.model(tokens, use_cache=False).logits
    with torch.no_grad(), overruled(reference, "llama", {0: None, 3: None}):
        torch.testing.assert_close(tried, reference(tokens, use_cache=False).logits, atol=2e-5, rtol=1e-4)
