"""Windows in a search: costs and trials in blocks against masks that are forced, memory, and what is found."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sa_convert.domain.calibrated import Distance
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.model import RunOptions
from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Calibration
from sa_convert.domain.units import Units
from sa_convert.errors import RecipeError
from sa_convert.observe import in_blocks
from sa_convert.observe.long_sequences import long_set, thinned
from sa_convert.observe.probe import Probe
from sa_convert.observe.resumed import Resumed
from sa_convert.observe.sequences import REPETITION, Sample
from sa_convert.observe.session import open_session
from sa_convert.plan.recipe_file import parse_recipe
from sa_convert.plan.savings import cache_at
from sa_convert.read.model_of import model_of
from sa_convert.read.open_model import open_model
from sa_convert.search.accounting import WholeCache
from sa_convert.search.budget import check_search
from sa_convert.search.rounds import State
from sa_convert.search.scoring import collect
from sa_convert.search.whole_cache import Priced, cache_path, cache_within, copying_rise, priced, search_cache
from sa_convert.texts.text import load_text
from sa_convert.treatments.ledger import Ledger, Offer
from sa_convert.treatments.low_rank.cost import LowRankCosts
from sa_convert.treatments.registry import searched
from sa_convert.treatments.window import cost as window_cost
from sa_convert.treatments.window.cost import WindowCosts, certain
from support.forced_windows import forced_windows
from support.planted import save_reader
from support.tiny_models import attentions_of, save_tiny

FAMILIES = ("llama", "gemma2", "gpt_oss", "qwen3", "olmo2", "cohere2", "gpt_neox", "gpt2", "phi3", "falcon", "bloom")
WINDOW = searched(("window",))
TOKENS = 24


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(in_blocks, "BLOCK", 5)
    monkeypatch.setattr(window_cost, "WINDOWS", (3, 6, 12))
    monkeypatch.setattr(window_cost, "SINKS", 2)


def opened(folder, family):
    model = save_tiny(family, folder)
    subject = model_of(open_model(str(folder)))
    return model, subject, Units(subject.geometry)


def sample(tokens, **keys):
    return Sample(tokens, keys.pop("kind", "prose"), torch.ones(len(tokens), dtype=torch.bool), kept=True, **keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_is_tried_in_blocks_as_with_masked_scores(family, tmp_path):
    model, subject, _ = opened(tmp_path, family)
    tokens = torch.randint(3, 120, (2, TOKENS))
    heads = subject.geometry.layers[2].group_size
    told = {2: {0: (2, 3)}, 3: {1: (1, 6), 3: (0, 4)}}
    groups = subject.geometry.layers[2].groups
    told = {layer: {min(group, groups - 1): window for group, window in row.items()} for layer, row in told.items()}
    rows = {
        layer: {group * heads + at: window for group, window in row.items() for at in range(heads)}
        for layer, row in told.items()
    }
    plan = Plan(
        {
            layer: {group: {"window": {"sinks": sinks, "tokens": window}} for group, (sinks, window) in row.items()}
            for layer, row in told.items()
        }
    )
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        with forced_windows(model, attentions_of(model, subject.family), rows):
            expected = model(tokens, use_cache=False).logits
        probe = Probe(model, subject.family)
        with probe.trying(plan):
            whole = model(tokens, use_cache=False).logits
            with probe.in_blocks():
                blocks = model(tokens, use_cache=False).logits
        with probe.in_blocks():
            untouched = model(tokens, use_cache=False).logits
    for found in (whole, blocks):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(untouched, plain, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_costs_are_what_masks_do_to_outputs_times_the_gradient(family, tmp_path):
    """Of two units: the change of the heads' outputs by a mask before the softmax, and the gradient by autograd."""
    model, subject, units = opened(tmp_path, family)
    tokens = torch.randint(3, 120, (TOKENS,))
    attentions = attentions_of(model, subject.family)
    inputs = {}

    def keep(index):
        def hook(_, args):
            inputs[index] = args[0]
            if args[0].requires_grad:
                args[0].retain_grad()

        return hook

    hooks = [one.o_proj.register_forward_pre_hook(keep(index)) for index, one in enumerate(attentions)]
    chances = model(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    labels = torch.multinomial(chances.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    (-chances.gather(1, labels).sum()).backward()
    plain = {index: (value.detach(), value.grad) for index, value in inputs.items()}
    expected, full = {}, subject.geometry.layers[3]
    for unit in (units.all[4 * 1 + 2], units.all[4 * 3 + 1]):
        for window in (3, 6):
            rows = {unit.layer: dict.fromkeys(unit.heads, (2, window))}
            with torch.no_grad(), forced_windows(model, attentions, rows):
                model(tokens[None], use_cache=False)
            before, gradient = plain[unit.layer]
            e = ((inputs[unit.layer] - before) * gradient)[0].sum(-1)
            expected[unit, window] = 0.5 * e.square().sum().item() / (TOKENS - 1)
    for hook in hooks:
        hook.remove()
    repeated = sample(tokens, kind=REPETITION, period=9)
    costs = collect(Probe(model, subject.family), units, [], Plan(), WINDOW, long=[sample(tokens), repeated, repeated])[
        "window"
    ]
    assert costs.windows == (3, 6)  # 12 is longer than the periods
    for (unit, window), value in expected.items():
        own = subject.geometry.layers[unit.layer].window
        if own is None or window + 2 < own:
            assert costs.costs[unit, window][0] == pytest.approx(value, rel=1e-3, abs=1e-10)
            assert value > 1e-9
        else:
            assert (unit, window) not in costs.costs
    assert full.window is None


def test_the_slope_under_a_plan_is_how_the_divergence_changes(tmp_path):
    """By finite differences: the heads' outputs move a little of the way to those of the window."""
    model, subject, units = opened(tmp_path, "llama")
    probe, tokens = Probe(model, subject.family), torch.randint(3, 120, (TOKENS,))
    before = Plan({2: {group: {"window": {"sinks": 0, "tokens": 2}} for group in range(4)}})
    repeated = sample(tokens, kind=REPETITION, period=9)
    found = collect(probe, units, [], before, WINDOW, long=[sample(tokens), repeated, repeated])["window"]
    unit = units.all[4 * 4 + 1]
    after = Plan({**before.layers, 4: {1: {"window": {"sinks": 2, "tokens": 3}}}})
    model.double()
    kept = {}

    def outputs(plan):
        hook = probe.output_projections[4].register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))
        with torch.no_grad(), probe.trying(plan):
            chances = model(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        hook.remove()
        return kept["x"], chances

    _, base = outputs(Plan())
    moved = outputs(after)[0] - outputs(before)[0]
    assert moved.abs().max() > 1e-3

    def divergence(amount):
        hook = probe.output_projections[4].register_forward_pre_hook(lambda _, args: (args[0] + amount * moved,))
        with torch.no_grad(), probe.trying(before):
            chances = model(tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        hook.remove()
        return (base.exp() * (base - chances)).sum(-1).mean().item()

    slope = (divergence(1e-3) - divergence(-1e-3)) / 2e-3
    assert found.slopes[unit, 3][0] == pytest.approx(slope, rel=1e-2)
    assert found.costs[units.all[4 * 2], 3][0] == pytest.approx(0.0, abs=1e-9)  # narrower already
    assert certain([0.5, -0.5, 0.4]) == 0.0
    assert 0 < certain([0.5, 0.4, 0.6]) < 1.5


def test_windows_are_offered_only_if_several_sequences_test_them_and_they_save(tmp_path):
    sliding = LayerGeometry(4, 2, 16, "sliding_attention", 6)
    units = Units(ModelGeometry((sliding, LayerGeometry(4, 2, 16), LayerGeometry(4, 2, 16, cached=False))))
    costs = WindowCosts(units, "fisher")
    costs.tested_by([13, 5, 7])
    assert costs.windows == (3, 6)
    account = WholeCache(units, 20)
    offer = costs.offer(units.all[0], 3)
    assert account.saved(units.all[0], offer) == 2 * 16 * (6 - 5)
    assert account.saved(units.all[2], costs.offer(units.all[2], 3)) == 2 * 16 * (20 - 5)
    assert account.total == 2 * 2 * 16 * 6 + 2 * 2 * 16 * 20
    assert {unit.layer for unit in WINDOW[0].candidates(units)} == {0, 1}


def test_a_pass_that_starts_at_a_later_layer_is_the_same(tmp_path):
    model, subject, _ = opened(tmp_path, "llama")
    probe = Probe(model, subject.family)
    one = sample(torch.randint(3, 120, (TOKENS,)))
    resumed = Resumed(probe, one)
    plan = Plan({4: {1: {"window": {"sinks": 0, "tokens": 2}}}})
    ran = []
    hooks = [block.module.mlp.register_forward_hook(lambda *_: ran.append(1)) for block in probe.blocks]
    found = resumed.divergence(plan)
    assert len(ran) == 2  # layers 4 and 5
    with torch.no_grad():
        base = model(one.tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        with probe.trying(plan):
            after = model(one.tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    assert found == pytest.approx((base.exp() * (base - after)).sum(-1).mean().item(), rel=1e-3)
    assert all("forward" not in block.module.__dict__ for block in probe.blocks)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_no_matrix_of_probabilities_is_kept_of_a_long_sequence(tmp_path, monkeypatch):
    """Neither made as a whole nor saved for the way back: memory grows with the length, not with its square."""
    monkeypatch.setattr(in_blocks, "BLOCK", 8)
    model, subject, units = opened(tmp_path, "llama")
    tokens = torch.randint(3, 120, (256,))
    one = Sample(tokens, "prose", thinned(torch.ones(256, dtype=torch.bool), 16), kept=True)
    repeated = Sample(tokens, REPETITION, one.scored, kept=True, period=100)
    saved = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept.numel()) or kept, lambda kept: kept),
    ):
        ledger = collect(Probe(model, subject.family), units, [], Plan(), WINDOW, long=[one, repeated, repeated])[
            "window"
        ]
    assert ledger.costs
    matrix = 8 * 256 * 256  # heads, queries, keys
    assert largest.elements <= matrix / 8  # the mask, which is made once for all layers
    assert max(saved) <= matrix / 8


def test_long_sequences_repeat_after_longer_than_the_windows_and_hold_periods_apart(tmp_path):
    from transformers import AutoTokenizer

    from support.tiny_models import save_tokenizer

    save_tiny("llama", tmp_path)
    save_tokenizer(tmp_path)
    made = [long_set(AutoTokenizer.from_pretrained(tmp_path), 120, load_text("builtin"), 400, seed) for seed in (0, 0)]
    assert [one.tokens.tolist() for one in made[0].fit] == [one.tokens.tolist() for one in made[1].fit]
    parts = (made[0].fit, made[0].held_out)
    fit, held = ([one for one in part if one.kind == REPETITION] for part in parts)
    assert not {one.period for one in fit} & {one.period for one in held}
    for one in (*fit, *held):
        tokens = one.tokens
        for at in one.scored.nonzero()[:, 0].tolist():
            assert int(tokens[at]) in tokens[max(0, at - one.period) : at].tolist()
    assert [sum(one.period > window for one in made[0].fit) for window in (0, 150, 270, 300)] == [4, 2, 1, 0]
    weight = sum(one.weight for one in fit) / sum(one.weight for one in made[0].fit if not one.repetition)
    assert weight == pytest.approx(0.25)
    assert not {tuple(one.tokens.tolist()) for one in made[0].fit} & {
        tuple(o.tokens.tolist()) for o in made[0].held_out
    }


def recipe_of(text):
    return parse_recipe(text, "r.yaml")


def test_the_group_that_reads_what_is_far_back_is_left_full_and_the_budget_is_met(tmp_path, monkeypatch):
    monkeypatch.setattr(in_blocks, "BLOCK", 64)
    monkeypatch.setattr(window_cost, "WINDOWS", (16, 32, 64))
    model = model_of(open_model(str(save_reader(tmp_path, 3, 2))))
    recipe = recipe_of("search: {cache: 60%, at: 256}\ntreatments: [window]")
    calibration = Calibration(sequences=4, length=32)
    with open_session(model, calibration, RunOptions(device="cpu"), treatments=WINDOW, at=256) as session:
        step = search_cache(session, recipe)
        found = priced(session, 256)
        within = cache_within(found, 0.5, None, recipe.origin)
    assert 2 not in step.plan.layers.get(3, {})
    left = cache_at(model, step.plan, 256) / cache_at(model, Plan(), 256)
    assert step.removed == pytest.approx(1 - left)
    assert 0.6 <= step.removed < 0.64
    assert step.measured.divergence < 1e-2
    assert within.removed > step.removed  # all else may go


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("search:\n  cache: 5%\n  at: 600", "line 3: the model has positions for 512 tokens, so .* 600: write 512 or"),
        ("search: {cache: 5%, at: 64}\ntreatments: [nothing]", "line 2: there is no treatment 'nothing'"),
    ],
)
def test_searches_that_cannot_be_are_refused(tmp_path, text, message):
    save_tiny("llama", tmp_path)
    with pytest.raises(RecipeError, match=message):
        check_search(model_of(open_model(str(tmp_path))), recipe_of(text))


def test_a_model_that_caches_nothing_is_refused(tmp_path):
    save_tiny("bert", tmp_path)
    with pytest.raises(RecipeError, match="line 1: the model caches nothing"):
        check_search(model_of(open_model(str(tmp_path))), recipe_of("search: {cache: 5%, at: 64}"))


class Known(Ledger):
    """A treatment that saves half of a unit's cache for a cost that is known."""

    def __init__(self, units, costs):
        super().__init__(units, "window", "fisher")
        self.known = costs

    def offers(self, unit, taken):
        cost = self.known[self.units.all.index(unit)]
        plan = {group: {"window": {"sinks": 0, "tokens": tokens}} for group in unit.groups for tokens in (8,)}
        yield Offer("window", cost, 0, plan)
        wider = {group: {"window": {"sinks": 0, "tokens": 12}} for group in unit.groups}
        yield Offer("window", cost / 10, 0, wider)


def test_a_unit_moves_on_to_a_narrower_window():
    units = Units(ModelGeometry((LayerGeometry(4, 2, 16),) * 2))
    account = WholeCache(units, 16)
    state = State({"window": Known(units, [1.0, 2.0, 3.0, 400.0])}, account=account)
    assert state.extend(0.25)
    assert state.removed == pytest.approx(0.25)
    assert [offer.plan[unit.groups[0]]["window"]["tokens"] for unit, offer in state.chosen.items()] == [8, 12, 12]
    assert state.estimate == pytest.approx(1.0 + 0.2 + 0.3)
    assert not state.extend(0.99)
    assert state.removed == pytest.approx(0.5)


class Copying:
    """Held-out samples on which copying is lost as soon as one of these units is treated."""

    base = Distance(1.0, 0.0, 0.0, (1.0,), (1.0,))

    def __init__(self, units):
        self.units, self.plans = units, []

    def measure(self, plan, description):
        self.plans.append(plan)
        lost = any(group in plan.layers.get(layer, {}) for layer, group in self.units)
        return Distance(1.0, 0.1, 1.0 * lost, (1.0,), (1.0 + lost,))


def test_a_plan_that_copies_badly_is_refused_and_others_go_on():
    """The estimate does not see that the first unit retrieves."""
    units = Units(ModelGeometry((LayerGeometry(4, 2, 16),) * 6))
    costs = [0.5, *[0.1] * 5, *[0.9] * 6]
    account, reference = WholeCache(units, 16), Copying({(0, 0)})
    found = Priced({"window": Known(units, costs)}, {}, account, reference)
    (step,) = cache_path(found, {0.37: 0.1})
    assert step.removed >= 0.37
    assert 0 not in step.plan.layers.get(0, {})
    assert copying_rise(step.measured, reference.base) == 0
    assert 0 in reference.plans[0].layers[0]  # it was tried
    (step,) = cache_path(found, {0.37: None})
    assert 0 in step.plan.layers[0]


def test_if_no_plan_copies_well_the_best_of_those_that_save_enough_is_taken():
    units = Units(ModelGeometry((LayerGeometry(4, 2, 16),) * 6))
    account = WholeCache(units, 16)
    reference = Copying({(layer, group) for layer in range(6) for group in range(2)})
    found = Priced({"window": Known(units, [0.5, *[0.1] * 5, *[0.9] * 6])}, {}, account, reference)
    (step,) = cache_path(found, {0.2: 0.1})
    assert step.removed >= 0.2
    assert step.removed == pytest.approx(account.removed(step.plan))
    assert step.plan == reference.plans[0]
    assert len(reference.plans) > 2


def test_repetition_counts_more_in_the_costs_of_every_treatment_that_knows_it_apart(tmp_path):
    model, subject, units = opened(tmp_path, "llama")
    tokens, unit = torch.randint(3, 120, (TOKENS,)), units.all[9]
    repeated = Sample(tokens, REPETITION, torch.arange(TOKENS) >= 9, weight=0.25, kept=True, period=9)
    long = [sample(tokens), repeated, repeated]
    ledger = collect(Probe(model, subject.family), units, [], Plan(), WINDOW, long=long)["window"]
    keys = LowRankCosts(units, "fisher")
    twelve, eight = (unit, (("keys", 12),)), (unit, (("keys", 8),))
    keys.costs, keys.repeated = {twelve: 0.5, eight: 0.9}, {twelve: 0.1, eight: 0.2}
    for found in (ledger, keys):
        once, thrice, five = (
            [offer.cost for offer in found.emphasized(emphasis).offers(unit, frozenset())]
            for emphasis in (1.0, 3.0, 5.0)
        )
        assert len(once) == 2
        for before, after, most in zip(once, thrice, five, strict=True):
            assert after > before > 0
            assert most - after == pytest.approx(after - before)
    assert [offer.cost for offer in keys.emphasized(3.0).offers(unit, frozenset())] == pytest.approx([0.7, 1.3])
