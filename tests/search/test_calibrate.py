"""Calibration against independent computations: the probe, the replay of layers, costs of sharing, ridge regression."""

import json

import numpy
import pytest
import torch

from sa_convert.domain.plan import Plan
from sa_convert.domain.units import Units
from sa_convert.families.table import FAMILIES
from sa_convert.heal.ridge import Sums, combine, solve
from sa_convert.models.task import NEXT_TOKEN, MaskedToken
from sa_convert.observe.probe import Probe
from sa_convert.observe.replay import Replay
from sa_convert.observe.sequences import REPETITION, Sample, calibration_set
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.scoring import collect, observe
from sa_convert.texts.text import load_text
from sa_convert.treatments.registry import searched
from sa_convert.treatments.share.cost import changes_of
from sa_convert.treatments.share.plans import plan_of
from sa_convert.treatments.share.sharing_map import SharingMap
from support.forced_softmax import forced
from support.tiny_models import attentions_of, save_tiny, save_tokenizer

NAMES = (
    "llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3", "olmo2", "opt", "cohere", "phi", "phi3", "gpt2", "gpt_neox",
    "gpt_bigcode", "falcon", "bloom", "gptj", "bert", "modernbert", "t5", "bart", "qwen3_next", "jamba", "gemma3",
)  # fmt: skip


def opened(folder, family, **changes):
    model = save_tiny(family, folder, **changes)
    subject = model_of(open_model(str(folder)))
    return model, subject, Units(subject.geometry)


def some_map(units, share=0.5):
    """Every second unit reuses heads of the nearest earlier layer of its kind, in reverse order."""
    rows = {}
    for unit in units.all[:: round(1 / share)]:
        layers = units.geometry.layers
        sources = [at for at in range(unit.layer) if layers[at] == layers[unit.layer] and at not in rows]
        if sources:
            row = rows.setdefault(unit.layer, [None] * layers[unit.layer].heads)
            for head in unit.heads:
                row[head] = (sources[-1], layers[unit.layer].heads - 1 - head)
    return SharingMap({layer: tuple(row) for layer, row in rows.items()})


def sample(tokens, scored=None):
    return Sample(tokens, "text", torch.ones(len(tokens), dtype=torch.bool) if scored is None else scored)


@pytest.mark.parametrize("family", NAMES)
def test_the_probe_attends_by_a_map_as_forced_attention_does(family, tmp_path):
    model, subject, units = opened(tmp_path, family)
    sharing = some_map(units)
    assert sharing.layers
    tokens = torch.randint(3, 120, (2, 24))
    inputs = {} if subject.family.modules.bidirectional else {"use_cache": False}
    inputs |= {"decoder_input_ids": tokens[:, :9]} if subject.family.encoder_decoder else {}
    rows = {layer: list(row) for layer, row in sharing.layers.items()}
    with torch.no_grad(), forced(model, attentions_of(model, subject.family), rows):
        expected = model(tokens, **inputs).logits
    plain = model(tokens, **inputs).logits
    probe = Probe(model, subject.family)
    torch.testing.assert_close(probe.model(tokens, **inputs).logits, plain, atol=1e-5, rtol=1e-5)
    with probe.trying(plan_of(sharing, units.geometry)):
        shared = probe.model(tokens, **inputs).logits
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=1e-5)
    assert (shared - plain).abs().max() > 1e-3


CHAINS = [name for name in NAMES if not FAMILIES[name].encoder_decoder]


@pytest.mark.parametrize("family", CHAINS)
def test_layers_run_one_by_one_give_what_the_model_gives(family, tmp_path):
    model, subject, units = opened(tmp_path, family)
    sharing = some_map(units)
    probe = Probe(model, subject.family)
    task = MaskedToken(((), ()), 3, frozenset()) if subject.family.modules.bidirectional else NEXT_TOKEN
    tokens = torch.randint(4, 120, (5, 24))
    samples = [Sample(row, "prose", task.scored(row[None])[0], task=task) for row in tokens]
    last = []
    hook = probe.blocks[-1].module.register_forward_hook(lambda _, __, output: last.append(output))
    with probe.trying(plan_of(sharing, units.geometry)):
        model(**task.batch(model, tokens).kwargs)
    hook.remove()
    expected = last[0][0] if isinstance(last[0], tuple) else last[0]
    replay = Replay(probe, samples, batch=2)
    with torch.no_grad(), probe.trying(plan_of(sharing, units.geometry)):
        for start in range(0, len(samples), replay.batch):
            chunk, loans = slice(start, start + replay.batch), {}
            for layer in range(len(probe.blocks)):
                with probe.lending(loans):
                    replay.states[chunk] = replay.run(layer, replay.states[chunk])
    torch.testing.assert_close(replay.states, expected, atol=1e-5, rtol=0)


def test_changes_of_the_loss_are_what_heads_outputs_and_gradients_say(tmp_path):
    """e[t, j, h] = (P_j V - P_h V)[t] . dloss/d(output of h)[t], head by head, from the model's own attention."""
    model, subject, units = opened(tmp_path, "llama")
    tokens = torch.randint(3, 120, (12,))
    layers = model.model.layers
    inputs, values = {}, {}
    for index, layer in enumerate(layers):

        def keep(_, args, index=index):
            inputs[index] = args[0]
            args[0].retain_grad()

        layer.self_attn.o_proj.register_forward_pre_hook(keep)
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out, index=index: values.update({index: out}))
    output = model(tokens[None], output_attentions=True, use_cache=False)
    chances = output.logits[0].log_softmax(-1)
    generator = torch.Generator().manual_seed(5)
    labels = torch.multinomial(chances.detach().exp(), 1, generator=generator)
    (-chances.gather(1, labels)[:-1, 0].sum()).backward()
    weights = [attention[0].detach() for attention in output.attentions]
    probe = Probe(model, subject.family)
    again = torch.Generator().manual_seed(5)
    passed = observe(probe, units, sample(tokens), Plan(), measure="fisher", generator=again)
    found = {observed.layer: changes_of(observed) for observed in passed if observed.layer}
    for layer in (1, 4):
        gradient = inputs[layer].grad[0].view(12, 8, 16)
        for head in (0, 3, 7):
            value = values[layer][0].detach().view(12, 4, 16)[:, head // 2]
            for source in ((0, 2), (layer - 1, 5), (layer, head)):
                change = (weights[source[0]][source[1]] - weights[layer][head]) @ value
                expected = (change * gradient[:, head]).sum(-1)
                torch.testing.assert_close(
                    found[layer][:, units.number_of(source), head], expected, atol=1e-6, rtol=1e-4
                )


def test_output_errors_have_the_mean_square_that_the_outputs_have(tmp_path):
    model, subject, units = opened(tmp_path, "llama")
    tokens = torch.randint(3, 120, (16,))
    states = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: states.update({index: args[0].detach()}))
    values = []
    model.model.layers[2].self_attn.v_proj.register_forward_hook(lambda _, __, out: values.append(out.detach()))
    weights = [attention[0].detach() for attention in model(tokens[None], output_attentions=True).attentions]
    matrix = model.model.layers[2].self_attn.o_proj.weight.detach()[:, 3 * 16 : 4 * 16]
    value = values[0][0].view(16, 4, 16)[:, 1]
    error = ((weights[1][6] - weights[2][3]) @ value) @ matrix.T
    expected = error.square().sum(-1).mean() / states[2].square().sum(-1).mean()
    probe = Probe(model, subject.family)
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack(
        [
            changes_of(
                list(observe(probe, units, sample(tokens), Plan(), measure="output error", generator=generator))[2]
            )
            .square()
            .mean(0)[units.number_of((1, 6)), 3]
            for _ in range(300)
        ]
    ).mean()
    assert mean.item() == pytest.approx(expected.item(), rel=0.15)


def test_costs_under_a_map_say_what_the_divergence_from_the_base_says(tmp_path):
    """The first-order term: the slope of KL(base || shared) where a head's weights move a little towards others'."""
    model, subject, units = opened(tmp_path, "llama")
    sharing = SharingMap({3: ((2, 1), (2, 0), *[None] * 6)})
    tokens = torch.randint(3, 120, (16,))
    probe = Probe(model, subject.family)
    plan = plan_of(sharing, units.geometry)
    costs = collect(probe, units, [sample(tokens)], plan, searched(), seed=3)["share"]
    model.double()  # differences of a small divergence
    base = model(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1).detach()
    unit, step = units.all[4 * 4 + 1], 1e-2
    place = costs.shortlist[4][unit.heads[0]].tolist()
    source = units.head(place[0])

    def divergence(amount):
        def blend(_, args):
            with torch.no_grad():
                heads = args[0].view(1, 16, 8, 16).clone()
                heads[:, :, unit.heads[0]] += amount * delta
            return (heads.flatten(2),)

        hook = probe.output_projections[4].register_forward_pre_hook(blend)
        with torch.no_grad(), probe.trying(plan_of(sharing, units.geometry)):
            chances = model(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        hook.remove()
        return (base.exp() * (base - chances)).sum(-1).mean().double().item()

    seen = {}
    with (
        torch.no_grad(),
        probe.trying(plan_of(sharing, units.geometry)),
        probe.observing(lambda layer: seen.update({layer.layer: layer})),
    ):
        model(tokens[None], use_cache=False)
    value = seen[4].value[0, unit.groups[0]]
    delta = (seen[source[0]].probabilities[0, source[1]] - seen[4].probabilities[0, unit.heads[0]]) @ value
    slope = (divergence(step) - divergence(-step)) / (2 * step)
    assert costs.first[unit][0].item() == pytest.approx(slope, rel=0.02)


def test_ridge_is_least_squares_with_rows_for_the_penalty():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), torch.randn(40, 3, generator=generator)
    parts = [Sums(), Sums()]
    parts[0].add(x[:25], y[:25])
    parts[1].add(x[25:], y[25:])
    sums = combine([(1.0, parts[0]), (1.0, parts[1])])
    penalty = (0.3 * (x.T @ x).diagonal().mean()).sqrt() * torch.eye(6)
    rows, targets = torch.cat([x, penalty]).numpy(), torch.cat([y, torch.zeros(6, 3)]).numpy()
    expected = numpy.linalg.lstsq(rows.astype("float64"), targets.astype("float64"), rcond=None)[0]
    found = solve(sums, 0.3)
    numpy.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    left = (y - x @ found).square().sum() / y.square().sum()
    assert sums.remaining(found) == pytest.approx(left.item(), rel=1e-4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return AutoTokenizer.from_pretrained(folder)


def test_calibration_sets_are_repeatable_broad_and_hold_samples_out(tokenizer):
    made = [calibration_set(tokenizer, 120, load_text("builtin"), 20, 64, seed=seed) for seed in (0, 0, 1)]
    first, second, other = ([s.tokens.tolist() for s in (*found.fit, *found.held_out)] for found in made)
    assert first == second
    assert first != other
    fit, held = made[0].fit, made[0].held_out
    assert {sample.kind for sample in fit} == {"prose", "code", "table", "repetition", REPETITION}
    assert {sample.kind for sample in held} >= {"prose", "code", REPETITION}
    assert not {tuple(s.tokens.tolist()) for s in fit} & {tuple(s.tokens.tolist()) for s in held}
    text = sum(sample.weight for sample in fit if not sample.repetition)
    assert sum(sample.weight for sample in fit if sample.repetition) == pytest.approx(0.25 * text)


def test_repetitions_are_scored_where_they_repeat(tokenizer):
    for sample in calibration_set(tokenizer, 120, load_text("builtin"), 20, 200).fit:
        if sample.repetition:
            tokens, at = sample.tokens.tolist(), sample.scored.tolist().index(True)
            period = next(
                p for p in range(1, 200) if tokens[-1] == tokens[-1 - p] and tokens[at:] == tokens[at - p : -p]
            )
            assert tokens[at:] == tokens[at - period : len(tokens) - period]
            assert not any(sample.scored[:at])
