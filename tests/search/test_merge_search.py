"""A search that may leave layers fewer KV groups finds those whose KV groups are alike."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Calibration
from sa_convert.errors import RecipeError
from sa_convert.jobs.converting import ConvertOptions, plan
from sa_convert.observe.session import open_session
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.accounting import WholeCache
from sa_convert.search.fitting import learn
from sa_convert.search.rounds import State
from sa_convert.search.scoring import collect
from sa_convert.treatments.merge.cost import FACTOR
from sa_convert.treatments.registry import searched
from support.merged_models import LENGTH, merged_base
from support.tiny_models import save_tiny, save_tokenizer

SEARCH = """
search: {{cache: {part}%, at: 32}}
treatments: [{treatments}]
calibration: {{sequences: 6, length: 32}}
gate: {{max_perplexity_increase: 90%}}
"""


def merged(left):
    return {group: {"merge": {"groups": left}} for group in range(4)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of which all KV groups of layer 4 have the same keys and values, and those of layer 2 two by two."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny("llama", folder, max_shard_size="10GB", attention_bias=False)
    save_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer, sources in ((4, (0, 0, 0, 0)), (2, (0, 0, 2, 2))):
        for side in "kv":
            name = f"model.layers.{layer}.self_attn.{side}_proj.weight"
            heads = tensors[name].unflatten(0, (4, -1))
            tensors[name] = heads[list(sources)].flatten(0, 1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def found(base, treatments, part):
    recipe = parse_recipe(SEARCH.format(treatments=treatments, part=part), "search.yaml")
    return plan(str(base), recipe, ConvertOptions(device="cpu"))


@pytest.mark.parametrize("treatments", ["merge", "drop, merge"])
def test_kv_groups_that_are_alike_become_one(base, treatments):
    conversion = found(base, treatments, 20)
    assert conversion.plan == Plan({2: merged(2), 4: merged(1)})
    change = conversion.savings.cache_bytes_per_token
    assert (change.before - change.after) / change.before == pytest.approx(5 / 24)


def test_a_search_by_the_command_line(base, cli, tmp_path):
    (tmp_path / "r.yaml").write_text(SEARCH.format(treatments="merge", part=20))
    done = cli("convert", base, "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["treatments"] == {"merge": {"groups": 8}}
    assert abs(report["perplexity"]["after"] / report["perplexity"]["before"] - 1) < 1e-4
    assert "2: {merge: {groups: 2}}\n  4: merge\n" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_part_of_the_keys_may_be_searched_for_and_no_more_than_there_is(base):
    text = "sharing: {{search: {{key_cache: {}%}}}}\ntreatments: [merge]\ncalibration: {{sequences: 6, length: 32}}\n"
    conversion = plan(str(base), parse_recipe(text.format(12), "r.yaml"), ConvertOptions(device="cpu"))
    assert conversion.plan == Plan({4: merged(1)})
    with pytest.raises(RecipeError, match=r"which is 75\.0% at the most"):
        plan(str(base), parse_recipe(text.format(80), "r.yaml"), ConvertOptions(device="cpu"))


def test_costs_are_those_of_gradients_at_the_changed_output(base):
    """Half the mean square of by what the layer's output changes, along the gradient there."""
    model = model_of(open_model(str(base)))
    with open_session(model, Calibration(sequences=6, length=LENGTH), treatments=searched(["merge"])) as session:
        learn(session, None)
        samples = [sample for sample in session.samples.fit if not sample.repetition][:1]
        ledger = collect(session.probe, session.units, samples, Plan(), session.treatments)["merge"]
        run, inputs, outputs = session.probe.model, samples[0].tokens[None], []

        def keep(module, args, kwargs, output):
            outputs.append(output[0].detach().requires_grad_(True))
            return (outputs[-1], *output[1:])

        handle = run.model.layers[5].self_attn.register_forward_hook(keep, with_kwargs=True)
        chances = run(inputs, use_cache=False).logits[0].log_softmax(-1)
        drawn = torch.multinomial(chances.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
        count = len(samples[0].tokens) - 1
        (gradient,) = torch.autograd.grad(-chances.gather(1, drawn)[:count].sum(), [outputs[0]])
        for left in (1, 2):
            with torch.no_grad(), merged_base(run, "llama", base, {5: left}):
                run(inputs, use_cache=False)
            change = outputs[-1] - outputs[0]
            wanted = 0.5 * ((change * gradient).sum(-1) ** 2).sum().item() / count
            assert ledger.left[left].costs[5] == pytest.approx(wanted, rel=1e-2)
            assert ledger.left[left].cost(5) == pytest.approx(FACTOR * ledger.left[left].costs[5])
        handle.remove()


def test_a_layer_may_go_on_to_fewer_and_is_never_divided(base):
    model = model_of(open_model(str(base)))
    treatments = searched(["merge", "share", "window"])
    with open_session(model, Calibration(sequences=6, length=32), treatments=treatments, at=64) as session:
        learn(session, None)
        plan = Plan({3: merged(2)})
        ledgers = collect(session.probe, session.units, session.samples.fit[:2], plan, treatments)
        state = State(ledgers, plan, WholeCache(session.units, 64))
        moves = [move for ledger in ledgers.values() for move in ledger.moves(state) if state._may(move)]
        mine = [move for move in moves if any(unit.layer == 3 for unit in move.offers)]
        assert [offer.plan for offer in mine[0].offers.values()] == [{group: told} for group, told in merged(1).items()]
        assert len(mine) == 1
        state.chosen.update(mine[0].offers)
        assert state.plan == Plan({3: merged(1)})
        state.undo(next(iter(mine[0].offers)), State(ledgers, plan).chosen)
        assert state.plan == plan


def test_a_tried_plan_is_the_base_with_projected_keys_and_values(base):
    tokens = torch.randint(3, 120, (1, 16), generator=torch.Generator().manual_seed(1))
    model = model_of(open_model(str(base)))
    with open_session(model, Calibration(sequences=6, length=LENGTH)) as session:
        from sa_convert.treatments.merge.learned import learn as see

        see(session, [1, 3])
        with session.probe.trying(Plan({1: merged(1), 3: merged(2)})), torch.no_grad():
            tried = session.probe.model(tokens, use_cache=False).logits
        plain = session.probe.model(tokens, use_cache=False).logits
        with torch.no_grad(), merged_base(session.probe.model, "llama", base, {1: 1, 3: 2}) as reference:
            wanted = reference(tokens, use_cache=False).logits
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(tried, wanted, atol=5e-5, rtol=1e-3)
