"""Drop: the attention of a layer puts out nothing, and the residual stream goes on alone.

After LLM-Drop (He et al., arXiv 2406.15786).
"""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.domain.treated import Look
from sa_convert.domain.units import Unit, Units
from sa_convert.treatments.whole_layers import WholeLayerTreatment

if TYPE_CHECKING:
    from sa_convert.domain.calibrated import Measure
    from sa_convert.treatments.ledger import Ledger
    from sa_convert.treatments.trial import Trial

FACTOR = 1.4
"""What it costs, to what is estimated, on SmolLM2-135M."""


class DropTreatment(WholeLayerTreatment):
    """A layer without attention."""

    name = "drop"
    file = __file__
    look = Look("drop", "#333333", "no attention at all", ink="white", mark="cross")
    done = "have no attention"

    def __init__(self, spared: tuple[int, ...] = ()) -> None:
        """spared: layers that a search leaves as they are."""
        self.spared = spared

    def candidates(self, units: Units) -> list[Unit]:
        return [unit for unit in super().candidates(units) if unit.layer not in self.spared]

    def ledger(self, units: Units, plan: Plan, measure: "Measure", known: "Ledger | None" = None) -> "Ledger":
        from sa_convert.treatments.whole_layer_costs import WholeLayerCosts

        return WholeLayerCosts(
            units,
            self.name,
            measure,
            plan,
            self.candidates(units),
            change=lambda observed: -observed.output.float(),
            factor=FACTOR,
        )

    def trial(self, plan: Plan) -> "Trial":
        from sa_convert.treatments.drop.trying import DropTrial

        return DropTrial(plan)
