"""Low rank: what the treatment is called, its rules, and what it changes.

After Eigen Attention (arXiv 2408.05646), chosen by KV group, in bases that are weighted by what the loss is sensitive
to. Its arguments are {"keys": r, "values": v}, or one of them: so many numbers are cached of a key (before it is turned
by position) and of a value.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sa_convert.domain.answers import Answers
from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Arguments, Plan, frozen
from sa_convert.domain.recipe_map import RecipeValueError
from sa_convert.domain.treated import Drawing, Inspected, Treated
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import PlanError
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.low_rank import drawing
from sa_convert.treatments.low_rank.rules import SIDES, refusal

if TYPE_CHECKING:
    from sa_convert.domain.calibrated import Measure
    from sa_convert.domain.model import Model
    from sa_convert.treatments.ledger import Ledger, Observed
    from sa_convert.treatments.trial import Trial


class LowRankTreatment(Treatment):
    """A KV group caches its keys, its values, or both in fewer numbers."""

    name = "low_rank"
    file = __file__
    fits = True
    impossible = "No layer of this model caches keys or values that could be cached in fewer numbers."

    def parse(self, arguments: Any) -> Arguments:
        if not isinstance(arguments, Mapping) or not arguments or set(arguments) - set(SIDES):
            raise RecipeValueError(f"low_rank takes keys, values, or both, such as {{keys: 32}}, not {arguments!r}")
        for side, rank in arguments.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise RecipeValueError(f"{side} is a whole number from 1, not {rank!r}", side)
        return frozen(arguments)

    def check(self, plan: Plan, geometry: ModelGeometry) -> None:
        for index, groups in plan.groups_of(self.name).items():
            layer, name = geometry.layers[index], plan.label(index)
            for group, told in groups.items():
                for side, rank in told.items():
                    reason = refusal(geometry, index, side)
                    if reason:
                        raise PlanError(f"Layer {name} KV group {group} cannot have low-rank {side}: {reason}.")
                    if rank >= layer.head_dim:
                        raise PlanError(
                            f"Layer {name} KV group {group}: {side} of rank {rank} are no less than the "
                            f"{layer.head_dim} numbers that they have in the base; write fewer."
                        )
                others = set(plan.layers[index][group]) & {"window", "share"}
                if "keys" in told and others:
                    raise PlanError(
                        f"Layer {name} KV group {group} cannot have low-rank keys and {others.pop()} together; choose "
                        "one of them."
                    )

    def keeps_outputs(self, plan: Plan) -> bool:
        told = (each for groups in plan.groups_of(self.name).values() for each in groups.values())
        return not any("values" in each for each in told)

    def answers(self, before: Answers, layer: LayerGeometry, arguments: Arguments) -> Answers:
        keys, values = (arguments.get(side, layer.head_dim) for side in SIDES)
        return replace(before, keys=min(before.keys, keys), values=min(before.values, values))

    def edits(self, model: "Model", plan: Plan) -> Mapping[str, TensorEdit]:
        from sa_convert.treatments.low_rank.edits import awaited

        return awaited(model, plan)

    def learner(self, units: Units) -> "Callable[[Observed], None]":
        from sa_convert.treatments.low_rank.learned import learner

        return learner(units).see

    def join(self) -> None:
        from sa_convert.treatments.low_rank.learned import learned

        learned().join()

    def fit(self, session: Any, plan: Plan) -> Fitted:
        from sa_convert.treatments.low_rank.edits import fitted
        from sa_convert.treatments.low_rank.learned import learned

        return fitted(session.model, plan, learned())

    def candidates(self, units: Units) -> Collection[Unit]:
        geometry = units.geometry
        return [unit for unit in units.all if any(refusal(geometry, unit.layer, side) is None for side in SIDES)]

    def trial(self, plan: Plan) -> "Trial":
        from sa_convert.treatments.low_rank.trying import LowRankTrial

        return LowRankTrial(plan)

    def ledger(self, units: Units, plan: Plan, measure: "Measure", known: "Ledger | None" = None) -> "Ledger":
        from sa_convert.treatments.low_rank.cost import LowRankCosts

        return LowRankCosts(units, measure, plan)

    def treated(self, plan: Plan, geometry: ModelGeometry) -> Treated:
        return drawing.treated(plan, geometry)

    def drawing(self, plan: Plan, geometry: ModelGeometry) -> Drawing:
        return drawing.drawing(plan, geometry)

    def inspected(self, geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
        return drawing.inspected(geometry, plan, reason)
