"""A treatment of four small files, in a package of its own: the output of whole KV groups is zero.

What it is for: that nothing else has to know of it (tests/house/test_toy_treatment.py).
"""

from pathlib import Path

PACKAGE = "zeroed_groups"

FILES = {
    "__init__.py": '"""KV groups whose output is zero: they need no query, no key, and no value."""\n',
    "treatment.py": '''"""What the treatment is called, its rules, and what it changes."""

from dataclasses import replace

from sa_convert.domain.recipe_map import RecipeValueError
from sa_convert.errors import PlanError
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.trial import Trial

from . import cost, drawing


class ZeroTreatment(Treatment):
    name = "zero"
    file = __file__
    impossible = "Every layer has a single KV group, and one has to stay."

    def parse(self, arguments):
        if arguments is not True:
            raise RecipeValueError(f"zero takes no arguments but true, not {arguments!r}")
        return arguments

    def check(self, plan, geometry):
        for layer, groups in plan.groups_of(self.name).items():
            if len(groups) >= geometry.layers[layer].groups:
                raise PlanError(f"Layer {plan.label(layer)} would have no KV group left; leave one as it is.")

    def answers(self, before, layer, arguments):
        return replace(before, heads=(), scores=(), keys=0)

    def candidates(self, units):
        return [unit for unit in units.all if 0 not in unit.groups]

    def trial(self, plan):
        return ZeroTrial(plan.groups_of(self.name))

    def ledger(self, units, plan, measure, known=None):
        return cost.ZeroCosts(units, self.name, measure, without_plan=not plan)

    def drawing(self, plan, geometry):
        return drawing.drawing(plan.groups_of(self.name), geometry)


class ZeroTrial(Trial):
    def __init__(self, groups):
        self.groups = groups

    def value(self, layer, value):
        if layer not in self.groups:
            return value
        kept = value.new_ones(value.shape[1])
        kept[list(self.groups[layer])] = 0
        return value * kept[:, None, None]
''',
    "cost.py": '''"""What it costs to lose the output of a unit: half the expected square of the change of the loss."""

from sa_convert.treatments.ledger import Ledger, Offer


class ZeroCosts(Ledger):
    def __init__(self, *about, **options):
        super().__init__(*about, **options)
        self.costs = {}

    def add(self, observed):
        if observed.slope:
            return
        change = (observed.output.float() * observed.gradient.float()).sum(-1)  # (T, H)
        for unit in self.units.all:
            if unit.layer == observed.layer and 0 not in unit.groups:
                cost = 0.5 * float(change[:, list(unit.heads)].sum(1).square().sum()) * observed.weight
                self.costs[unit] = self.costs.get(unit, 0.0) + cost

    def best(self, unit, taken):
        if unit not in self.costs:
            return None
        plan = {group: {"zero": True} for group in unit.groups}
        return Offer(self.treatment, self.costs[unit], self.saved(unit), plan)
''',
    "drawing.py": '''"""How the figure shows it."""

from sa_convert.domain.treated import Drawing, Look

LOOK = Look("zero", "#202020", "output is zero", label="0", ink="white")


def drawing(groups, geometry):
    looks = {(layer, group): LOOK for layer, told in groups.items() for group in told}
    title = f"{len(looks)} of {geometry.total_groups} KV groups put out zero"
    return Drawing(title=title, note="0 in a cell: the group has no queries and no keys", looks=looks, legend=("zero",))
''',
    "runtime.py": '''"""KV groups whose output is zero, in a converted model."""


class Zero:
    """Their heads have no query and no key; the others attend as in the base."""

    def __init__(self, stack):
        self.shapes, self.layers = stack.shapes, stack.layers

    def touches(self, layer):
        return layer in self.layers

    def own_heads(self, layer):
        heads, size, _ = self.shapes[layer]
        return tuple(head for head in range(heads) if head // size not in self.layers.get(layer, {}))

    def attend(self, call, query, key, value, mask, then):
        heads, size, _ = self.shapes[call.layer]
        own = self.own_heads(call.layer)
        groups = sorted({head // size for head in own})
        found, _ = then(query, key, value[:, groups], mask)  # (B, T, O, D)
        output = found.new_zeros(*found.shape[:2], heads, found.shape[-1])
        output[:, :, list(own)] = found
        return output, None
''',
}


def write_package(home: Path) -> None:
    """The package, in a folder that is on the path."""
    folder = home / PACKAGE
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
