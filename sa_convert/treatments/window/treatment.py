"""Windows: a KV group sees the first tokens of its sequence (sinks) and the most recent ones, at their true positions.

After SqueezeAttention (arXiv 2404.04793) and DuoAttention (arXiv 2410.10819), as a property of the checkpoint. Its
arguments are {"sinks": S, "tokens": W}. The query at place i sees the key at place j <= i if j is a real token (not
padding), and either i - j < W, or j is among the first S real tokens of its sequence.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sa_convert.domain.answers import Answers
from sa_convert.domain.geometry import LayerGeometry, ModelGeometry
from sa_convert.domain.plan import Arguments, Plan, frozen
from sa_convert.domain.recipe_map import RecipeValueError
from sa_convert.domain.treated import Drawing, Inspected, Treated
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import PlanError
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.window import drawing
from sa_convert.treatments.window.rules import WindowLimits, refusal

if TYPE_CHECKING:
    from sa_convert.domain.calibrated import Measure
    from sa_convert.treatments.ledger import Ledger
    from sa_convert.treatments.trial import Trial

KEYS = ("sinks", "tokens")


class WindowTreatment(Treatment):
    """A KV group caches sinks and a window, however long the text is."""

    name = "window"
    file = __file__
    keeps_shapes = True
    impossible = "No layer of this model caches what a decoder attends to, so no window would save anything."

    def __init__(self, limits: WindowLimits | None = None) -> None:
        """limits: what a search may choose of it."""
        self.limits = limits or WindowLimits()

    def parse(self, arguments: Any) -> Arguments:
        if not isinstance(arguments, Mapping) or set(arguments) != set(KEYS):
            raise RecipeValueError(
                f"window takes sinks and tokens, such as {{sinks: 4, tokens: 256}}, not {arguments!r}"
            )
        for key, least in (("sinks", 0), ("tokens", 1)):
            if not isinstance(arguments[key], int) or isinstance(arguments[key], bool) or arguments[key] < least:
                raise RecipeValueError(f"{key} is a whole number from {least}, not {arguments[key]!r}", key)
        return frozen({key: arguments[key] for key in KEYS})

    def check(self, plan: Plan, geometry: ModelGeometry) -> None:
        for index, groups in plan.groups_of(self.name).items():
            reason = refusal(geometry.layers[index])
            if reason:
                raise PlanError(
                    f"Layer {plan.label(index)} KV group {next(iter(groups))} cannot have a window: {reason}."
                )

    def answers(self, before: Answers, layer: LayerGeometry, arguments: Arguments) -> Answers:
        reach = arguments["sinks"] + arguments["tokens"]
        return replace(before, reach=reach if before.reach is None else min(before.reach, reach))

    def candidates(self, units: Units) -> list[Unit]:
        return [unit for unit in units.all if self.limits.refusal(units.geometry.layers[unit.layer]) is None]

    def ledger(self, units: Units, plan: Plan, measure: "Measure", known: "Ledger | None" = None) -> "Ledger":
        from sa_convert.treatments.window.cost import WindowCosts

        known = known if isinstance(known, WindowCosts) else None
        return WindowCosts(units, measure, plan, known, limits=self.limits)

    def treated(self, plan: Plan, geometry: ModelGeometry) -> Treated:
        return drawing.treated(plan, geometry)

    def drawing(self, plan: Plan, geometry: ModelGeometry) -> Drawing:
        return drawing.drawing(plan, geometry)

    def inspected(self, geometry: ModelGeometry | None, plan: Plan | None, reason: str | None) -> Inspected:
        return drawing.inspected(geometry, plan, reason)

    def trial(self, plan: Plan) -> "Trial":
        from sa_convert.treatments.window.trying import WindowTrial

        return WindowTrial(plan)
