"""Merge: the KV groups of a layer become fewer, and more query heads read each.

Its arguments are {"groups": N}: of so many KV groups are the keys and values of the layer from then on, each of which
takes the place of as many consecutive ones. A recipe writes it for the layer as a whole.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.answers import Answers
from sa_convert.domain.checkpoint import TensorEdit, TensorEntry
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Arguments, Plan, frozen
from sa_convert.domain.recipe_map import RecipeValueError
from sa_convert.domain.treated import Drawing, Inspected, Treated
from sa_convert.domain.units import Unit, Units
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.merge import drawing
from sa_convert.treatments.merge.rules import ALONE, NAME, check_layer, merged_layers, refusal

if TYPE_CHECKING:
    import torch

    from sa_convert.domain.calibrated import Measure
    from sa_convert.treatments.ledger import Ledger
    from sa_convert.treatments.trial import Trial


class MergeTreatment(Treatment):
    """A layer with fewer KV groups."""

    name = NAME
    file = __file__
    fits = True
    for_all = frozen({"groups": ALONE})
    impossible = "No layer of this model has KV groups that could become fewer."

    def parse(self, arguments: Any) -> Arguments:
        if not isinstance(arguments, Mapping) or set(arguments) != {"groups"}:
            raise RecipeValueError(
                f"merge takes the number of KV groups that are left, {{groups: 1}}, not {arguments!r}"
            )
        number = arguments["groups"]
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise RecipeValueError(f"groups is a whole number from 1, not {number!r}", "groups")
        return frozen(arguments)

    def check(self, plan: Plan, geometry: ModelGeometry) -> None:
        for index in plan.groups_of(NAME):
            check_layer(plan, geometry, index)

    def answers(self, before: Answers, layer: LayerGeometry, arguments: Arguments) -> Answers:
        """The first of the KV groups that become one caches for all of them."""
        group, each = layer.group_of(before.heads[0]), layer.groups // arguments["groups"]
        return before if group % each == 0 else replace(before, keys=0, values=0)

    def edits(self, model: Model, plan: Plan) -> dict[str, TensorEdit]:
        from sa_convert.treatments.merge.projections import entries, shapes

        edits: dict[str, TensorEdit] = {}
        for index, groups in merged_layers(plan).items():
            made = shapes(model, index, groups)
            for side, entry in entries(model, index).items():
                size = entry.bytes // entry.elements * prod(made[side])
                awaited = TensorEntry(entry.name, entry.dtype, made[side], Path(), 0, size)
                edits[entry.name] = TensorEdit(replacement=awaited)
        return edits

    def keeps_outputs(self, plan: Plan) -> bool:
        """They read other values than in the base, which a refit of its matrices would not know."""
        return False

    def prepare(self, session: Any, plan: Plan | None) -> None:
        from sa_convert.treatments.merge.learned import learn

        units = self.candidates(session.units)
        learn(session, sorted({unit.layer for unit in units}) if plan is None else merged_layers(plan))

    def fit(self, session: Any, plan: Plan) -> Fitted:
        from sa_convert.treatments.merge.learned import learned
        from sa_convert.treatments.merge.projections import entries, written

        tensors: dict[str, torch.Tensor] = {}
        for index, groups in merged_layers(plan).items():
            names = entries(session.model, index)
            made = written(session.model, index, learned().merged(index, groups))
            tensors |= {names[side].name: tensor for side, tensor in made.items()}
        return Fitted(tensors)

    def candidates(self, units: Units) -> Collection[Unit]:
        """Without those that the others of their layer are merged into: they cache for all of them."""
        return [unit for unit in units.all if refusal(units.geometry, unit.layer) is None and unit.groups != (0,)]

    def trial(self, plan: Plan) -> "Trial":
        from sa_convert.treatments.merge.trying import MergeTrial

        return MergeTrial(plan)

    def ledger(self, units: Units, plan: Plan, measure: "Measure", known: "Ledger | None" = None) -> "Ledger":
        from sa_convert.treatments.merge.cost import MergeCosts

        return MergeCosts(units, measure, plan)

    def treated(self, plan: Plan, geometry: ModelGeometry) -> Treated:
        return drawing.treated(plan, geometry)

    def drawing(self, plan: Plan, geometry: ModelGeometry) -> Drawing:
        return drawing.drawing(plan, geometry)

    def inspected(self, geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
        return drawing.inspected(geometry, plan, reason)
