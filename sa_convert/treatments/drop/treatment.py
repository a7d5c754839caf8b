"""Drop: the attention of a layer puts out nothing, and the residual stream goes on alone.

After LLM-Drop (He et al., arXiv 2406.15786).
"""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.domain.treated import Look
from sa_convert.treatments.whole_layers import WholeLayerTreatment

if TYPE_CHECKING:
    from sa_convert.treatments.trial import Trial


class DropTreatment(WholeLayerTreatment):
    """A layer without attention."""

    name = "drop"
    file = __file__
    look = Look("drop", "#ffffff", "no attention at all", label="×")
    done = "have no attention"

    def trial(self, plan: Plan) -> "Trial":
        from sa_convert.treatments.drop.trying import DropTrial

        return DropTrial(plan)
