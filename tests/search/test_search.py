"""The search by itself: costs that are known, so that the best choice is known, too."""

import itertools

import pytest
import torch

from sa_convert.domain.calibrated import Distance
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.domain.recipe import Origin, Search
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import RecipeError
from sa_convert.search.budget import check_budget, most_removable
from sa_convert.search.choose import Step, rounds
from sa_convert.search.rounds import State
from sa_convert.search.within import longest
from sa_convert.treatments.ledger import Ledger, Offer
from sa_convert.treatments.registry import searched
from sa_convert.treatments.share.cost import ShareCosts, shortlists

LAYER = LayerGeometry(heads=4, groups=2, head_dim=16)


def make_costs(geometry, seed=0):
    """Random costs: second moments of random vectors, as they are in truth."""
    units, generator = Units(geometry), torch.Generator().manual_seed(seed)
    costs = ShareCosts(units, "fisher")
    allowed, pairs = {}, {}
    for layer in range(1, len(geometry.layers)):
        heads = geometry.layers[layer].heads
        allowed[layer] = torch.zeros(units.offsets[layer + 1], dtype=torch.bool)
        for source in range(layer):
            if geometry.layers[source] == geometry.layers[layer]:
                allowed[layer][units.offsets[source] : units.offsets[source + 1]] = True
        if bool(allowed[layer].any()):
            pairs[layer] = torch.rand(heads, units.offsets[layer + 1], generator=generator)
    allowed = {layer: mask for layer, mask in allowed.items() if layer in pairs}
    costs.shortlist = shortlists(pairs, units, allowed, {}, 50)
    for unit in units.all:
        if unit.layer in pairs:
            size = len(unit.heads) * costs.shortlist[unit.layer].shape[1]
            vectors = torch.randn(size, 30, generator=generator)
            costs.second[unit] = vectors @ vectors.T / 30
            costs.first[unit] = torch.zeros(size)
    return costs


def cheapest(costs, unit, removed):
    """By trying everything."""
    count = costs.shortlist[unit.layer].shape[1]
    options = []
    for choice in itertools.product(range(count), repeat=len(unit.heads)):
        places = [
            costs.units.head(int(costs.shortlist[unit.layer][h][k])) for h, k in zip(unit.heads, choice, strict=True)
        ]
        if all(place[0] < unit.layer and costs.units.unit_of(place) not in removed for place in places):
            at = [head * count + k for head, k in enumerate(choice)]
            options.append((costs.second[unit][at][:, at].sum().item(), tuple(places)))
    return min(options)


def test_the_best_sources_of_a_unit_are_never_removed_ones_and_nearly_the_cheapest():
    costs = make_costs(ModelGeometry((LAYER,) * 4))
    near = 0
    for unit in costs.units.all[4:]:
        removed = frozenset({costs.units.all[1]})
        offer = costs.best(unit, removed)
        best, _ = cheapest(costs, unit, removed)
        assert offer.cost >= best - 1e-6
        near += offer.cost <= best * 1.05 + 1e-6
        assert not any(costs.units.unit_of(source) in removed for source in offer.sources)
        assert costs.value(unit, offer) == pytest.approx(offer.cost, rel=1e-5)
    assert near >= 4


def test_a_search_keeps_every_source_and_meets_the_budget():
    geometry = ModelGeometry((LAYER,) * 8)
    state = State({"share": make_costs(geometry)})
    assert state.extend(0.5)
    assert state.removed == pytest.approx(0.5)
    taken = set(state.chosen)
    for unit, offer in state.chosen.items():
        for source in offer.sources:
            assert source[0] < unit.layer
            assert state.units.unit_of(source) not in taken
    assert {unit: offer.sources for unit, offer in state.ledgers["share"].given(state.plan).items()} == {
        unit: offer.sources for unit, offer in state.chosen.items()
    }


def test_costs_may_be_measured_at_a_map_and_the_search_goes_on_from_there():
    geometry = ModelGeometry((LAYER,) * 8)
    first = State({"share": make_costs(geometry)})
    first.extend(0.25)
    again = make_costs(geometry, seed=1)
    again.without_plan = False
    second = State({"share": again}, first.plan)
    assert second.estimate == 0
    second.extend(0.5)
    assert set(first.chosen) <= set(second.chosen)
    before = second.estimate
    second.rematch()
    while second.swap():
        pass
    assert second.estimate <= before + 1e-9
    assert second.removed == pytest.approx(0.5)


def test_costs_without_a_map_count_what_is_shared_already():
    costs = make_costs(ModelGeometry((LAYER,) * 8))
    first = State({"share": costs})
    first.extend(0.25)
    second = State({"share": costs}, first.plan)
    assert second.estimate == pytest.approx(first.estimate, rel=1e-5)
    assert second.rise == 0
    second.extend(0.5)
    first.extend(0.5)
    assert second.plan == first.plan


class Halved(Ledger):
    """Another treatment: a unit keeps its attention, with half of its keys."""

    def __init__(self, units, cost):
        super().__init__(units, "halved", "fisher")
        self.cost = cost

    def best(self, unit, taken):
        plan = {group: {"halved": True} for group in unit.groups}
        return Offer("halved", self.cost, self.units.keys_of(unit) // 2, plan, lends=True)


def shared(state):
    return {unit: offer for unit, offer in state.chosen.items() if offer.treatment == "share"}


@pytest.mark.parametrize(("cost", "halved"), [(1e-9, 8), (1e9, 0)])
def test_another_treatment_competes_for_the_same_budget(cost, halved):
    costs = make_costs(ModelGeometry((LAYER,) * 8))
    state = State({"share": costs, "halved": Halved(costs.units, cost)})
    assert state.extend(0.25)
    assert state.removed == pytest.approx(0.25)
    assert sum(not offer.sources for offer in state.chosen.values()) == halved
    sources = {unit: offer.sources for unit, offer in costs.given(state.plan).items()}
    assert sources == {unit: offer.sources for unit, offer in shared(state).items()}
    assert state.plan.group_count("halved") == halved
    # What keeps half of its keys may still share: that saves the other half.
    assert state.extend(0.7)
    assert state.removed >= 0.7
    assert len(shared(state)) > 4


def test_attention_of_two_kinds_is_never_mixed():
    sliding = LayerGeometry(4, 2, 16, "sliding_attention", 8)
    geometry = ModelGeometry((sliding, LAYER, sliding, LAYER, sliding, LAYER))
    state = State({"share": make_costs(geometry)})
    assert not state.extend(0.99)
    assert state.removed == pytest.approx(4 / 6) == most_removable(state.units, searched())
    for unit, offer in state.chosen.items():
        assert all(geometry.layers[source[0]] == geometry.layers[unit.layer] for source in offer.sources)


def test_whole_layers_are_one_unit_where_the_family_needs_it():
    units = Units(ModelGeometry((LAYER,) * 3, granularity="layer"))
    assert units.all == tuple(Unit(layer, (0, 1), (0, 1, 2, 3)) for layer in range(3))
    assert units.removed_keys(units.all[:1]) == pytest.approx(1 / 3)


def test_budgets_that_cannot_be_met_say_what_can():
    geometry = ModelGeometry((LAYER,) * 4)
    check_budget(Units(geometry), searched(), Search(key_cache="75%"), Origin())
    with pytest.raises(RecipeError, match=r"80% of the key cache .* 75\.0% at the most: write 75% or less"):
        check_budget(Units(geometry), searched(), Search(key_cache="80%"), Origin())
    with pytest.raises(RecipeError, match="No layer of this model can borrow"):
        check_budget(Units(ModelGeometry((LAYER,))), searched(), Search(key_cache="5%"), Origin())


@pytest.mark.parametrize("part", [0.04, 0.1, 0.25, 0.4, 0.8])
def test_rounds_end_at_the_budget(part):
    parts = rounds(part)
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(part)
    assert all(after - before < 0.16 for before, after in itertools.pairwise([0.0, *parts]))


@pytest.mark.parametrize("allowed", [0, 1, 5, 9])
def test_thelongest_part_within_a_limit_is_found_by_few_measurements(allowed):
    steps = [Step(Plan({1: {0: {"share": [[0, at]]}}}), at / 10, 0.0) for at in range(1, 10)]
    base = Distance(1.0, 0.0, None, (1.0, 1.0))

    class Stub:
        def __init__(self):
            self.base, self.calls = base, 0

        def measure(self, plan, description):
            self.calls += 1
            rise = 0.01 if plan.layers[1][0]["share"][0][1] <= allowed else 0.5
            return Distance(1.0 + rise, rise, None, (1.0 + rise, 1.0 + rise))

    reference = Stub()
    found = longest(steps, 0.02, reference)
    assert (found is None) == (allowed == 0)
    if found:
        assert found.plan == steps[allowed - 1].plan
        assert found.measured is not None
    assert reference.calls <= 4
