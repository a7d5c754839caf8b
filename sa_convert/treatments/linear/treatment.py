"""Linear: one linear map, with a bias, of what goes into a layer's attention takes its place.

After NBL (Erdogan et al., arXiv 2505.21077). The map is fitted on calibration text to what the attention of the base
model puts out.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.checkpoint import DTYPE_BITS, FLOATS, TensorEdit, TensorEntry
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.domain.treated import Look
from sa_convert.domain.units import Unit, Units
from sa_convert.errors import CheckpointError, PlanError
from sa_convert.read.names import attention_prefix, output_name, projection
from sa_convert.treatments.whole_layers import WholeLayerTreatment

if TYPE_CHECKING:
    from sa_convert.domain.calibrated import Measure
    from sa_convert.treatments.ledger import Ledger
    from sa_convert.treatments.trial import Trial

FACTOR = 3.8
"""What it costs, to what is estimated, on SmolLM2-135M."""


class LinearTreatment(WholeLayerTreatment):
    """A layer with a linear map for attention."""

    name = "linear"
    file = __file__
    fits = True
    look = Look("linear", "#cc79a7", "a linear map in the place of attention", mark="diagonal")
    done = "have a linear map in the place of attention"

    def check(self, plan: Plan, geometry: ModelGeometry) -> None:
        super().check(plan, geometry)
        for index in plan.layers_of(self.name):
            if geometry.layers[index].stack.endswith("cross"):
                raise PlanError(
                    f"Layer {plan.label(index)} attends to what an encoder has read, which no map of its own input "
                    "knows: it cannot be made linear; drop may take its attention away."
                )

    def edits(self, model: Model, plan: Plan) -> dict[str, TensorEdit]:
        edits = super().edits(model, plan)
        for index in plan.layers_of(self.name):
            output, hidden = _tensors(model, index)
            for name, shape in _new(model, index, hidden).items():
                size = DTYPE_BITS[output.dtype] // 8 * (hidden if len(shape) == 1 else hidden * hidden)
                awaited = TensorEntry(name, output.dtype, shape, Path(), 0, size)
                edits[name] = TensorEdit(replacement=awaited, after=output.name)
        return edits

    def prepare(self, session: Any, plan: Plan | None) -> None:
        from sa_convert.treatments.linear.learned import learn

        units = self.candidates(session.units)
        wanted = sorted({unit.layer for unit in units}) if plan is None else plan.layers_of(self.name)
        learn(session, wanted, heads=plan is None)

    def fit(self, session: Any, plan: Plan) -> Fitted:
        import torch

        from sa_convert.treatments.linear.learned import learned

        tensors: dict[str, torch.Tensor] = {}
        after: dict[str, str] = {}
        for index in plan.layers_of(self.name):
            output, hidden = _tensors(session.model, index)
            found, dtype = learned().maps[index], getattr(torch, FLOATS[output.dtype])
            parts = (found.weight.to(dtype), found.bias.to(dtype))
            tensors |= dict(zip(_new(session.model, index, hidden), parts, strict=True))
            after |= dict.fromkeys(_new(session.model, index, hidden), output.name)
        return Fitted(tensors, after)

    def candidates(self, units: Units) -> list[Unit]:
        layers = units.geometry.layers
        return [unit for unit in super().candidates(units) if not layers[unit.layer].stack.endswith("cross")]

    def ledger(self, units: Units, plan: Plan, measure: "Measure", known: "Ledger | None" = None) -> "Ledger":
        from sa_convert.treatments.linear.learned import change_of_heads
        from sa_convert.treatments.whole_layer_costs import WholeLayerCosts

        costs = WholeLayerCosts(
            units, self.name, measure, plan, self.candidates(units), change=change_of_heads, factor=FACTOR
        )
        costs.reads_states = True
        return costs

    def trial(self, plan: Plan) -> "Trial":
        from sa_convert.treatments.linear.trying import LinearTrial

        return LinearTrial(plan)


def _tensors(model: Model, index: int) -> tuple[TensorEntry, int]:
    """The output projection, whose dtype the map has, and the number of elements of a state.

    Raises CheckpointError if it is not a plain float tensor.
    """
    name = output_name(model, index)
    output = model.checkpoint.tensors.get(name)
    if output is None or output.dtype not in FLOATS:
        kind = "missing" if output is None else output.dtype
        raise CheckpointError(
            f"'{name}' is {kind}, so no linear map can take its place: convert the unquantised model."
        )
    query = model.checkpoint.tensors[f"{attention_prefix(model, index)}{projection(model.family, 'query')}.weight"]
    return output, query.shape[0 if model.family.modules.transposed else 1]


def _new(model: Model, index: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a layer's map."""
    start = f"{attention_prefix(model, index)}linear"
    return {f"{start}.weight": (hidden, hidden), f"{start}.bias": (hidden,)}
