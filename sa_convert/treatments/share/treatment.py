"""Shared Attention: query heads use the attention of heads in earlier layers (Liao & Vargas, arXiv 2407.12866).

Its arguments list, per query head of the KV group, null (own attention) or [source layer, source head]. The source is
an own head of an earlier layer of the same stack; layers count in the stack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sa_convert.domain.answers import Answers
from sa_convert.domain.geometry import Head, LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Arguments, Plan, frozen
from sa_convert.domain.recipe_map import RecipeValueError
from sa_convert.domain.treated import Drawing, Inspected, Treated
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import PlanError
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.share import drawing
from sa_convert.treatments.share.inspecting import inspected
from sa_convert.treatments.share.plans import map_of, plan_of, recipe_of
from sa_convert.treatments.share.rules import check_map, layer_difference

if TYPE_CHECKING:
    from sa_convert.domain.calibrated import Measure
    from sa_convert.domain.recipe import Recipe
    from sa_convert.treatments.ledger import Ledger
    from sa_convert.treatments.trial import Trial


class ShareTreatment(Treatment):
    """Heads borrow their scores. A KV group all of whose heads do has no key."""

    name = "share"
    file = __file__
    refits = True
    lends = True  # heads that own their attention, which `check_map` sees to

    def parse(self, arguments: Any) -> Arguments:
        if not _is_list(arguments) or not arguments:
            raise RecipeValueError(
                "share lists null or [source layer, source head] for each query head of the KV group"
            )
        for at, source in enumerate(arguments):
            if source is not None and not _is_place(source):
                raise RecipeValueError(f"{source!r} is neither null nor [source layer, source head]", at)
        return frozen(arguments)

    def check(self, plan: Plan, geometry: ModelGeometry) -> None:
        for index, groups in plan.groups_of(self.name).items():
            layer, name = geometry.layers[index], plan.label(index)
            for group, sources in groups.items():
                if len(sources) != layer.group_size:
                    raise PlanError(
                        f"Layer {name} KV group {group} lists {len(sources)} heads, but the model has "
                        f"{layer.group_size} query heads in each KV group."
                    )
        check_map(map_of(plan, geometry), geometry)

    def from_recipe(self, recipe: "Recipe", geometry: ModelGeometry) -> Plan | None:
        from sa_convert.treatments.share.spans import sharing_of

        if recipe.sharing is None:
            return None
        sharing = sharing_of(recipe, geometry)
        check_map(sharing, geometry)
        return plan_of(sharing, geometry)

    def to_recipe(self, plan: Plan, geometry: ModelGeometry) -> dict[str, Any]:
        return recipe_of(map_of(plan, geometry))

    def layers_in_recipe(self, plan: Plan, geometry: ModelGeometry) -> dict[str, Any]:
        return map_of(plan, geometry).to_json()

    def answers(self, before: Answers, layer: LayerGeometry, arguments: Arguments) -> Answers:
        borrowed = {head for head, source in zip(before.heads, arguments, strict=True) if source is not None}
        scores = tuple(head for head in before.scores if head not in borrowed)
        return replace(before, scores=scores, keys=before.keys if scores else 0)

    impossible = "No layer of this model can borrow the attention of an earlier one, so nothing can be shared."

    def candidates(self, units: Units) -> list[Unit]:
        """All but those in the first layer of every kind, in which no head has a source."""
        layers = units.geometry.layers
        return [
            unit
            for unit in units.all
            if any(layer_difference(layers[source], layers[unit.layer]) is None for source in range(unit.layer))
        ]

    def trial(self, plan: Plan) -> "Trial":
        from sa_convert.treatments.share.trying import ShareTrial

        return ShareTrial(plan)

    def ledger(self, units: Units, plan: Plan, measure: "Measure", known: "Ledger | None" = None) -> "Ledger":
        from sa_convert.treatments.share.cost import ShareCosts

        return ShareCosts(units, measure, plan, known if isinstance(known, ShareCosts) else None)

    def lenders(self, plan: Plan, geometry: ModelGeometry) -> Iterator[tuple[int, Head]]:
        rows = map_of(plan, geometry).layers.items()
        return ((layer, source) for layer, row in rows for source in row if source is not None)

    def treated(self, plan: Plan, geometry: ModelGeometry) -> Treated:
        return drawing.treated(map_of(plan, geometry), geometry)

    def drawing(self, plan: Plan, geometry: ModelGeometry) -> Drawing:
        return drawing.drawing(map_of(plan, geometry), geometry)

    def inspected(self, geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
        return inspected(geometry, map_of(plan, geometry) if plan and geometry else None, reason)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_place(source: object) -> bool:
    """Whether it is two whole numbers from 0."""
    if not isinstance(source, Sequence) or len(source) != 2:
        return False
    return all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in source)
