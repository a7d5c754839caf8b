"""Layers whose attention puts out nothing, tried on a base model that runs."""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.treatments.trial import Trial

if TYPE_CHECKING:
    import torch

NAME = "drop"


class DropTrial(Trial):
    """The output of these layers' attention is zero."""

    def __init__(self, plan: Plan) -> None:
        self.whole_layers = frozenset(plan.layers_of(NAME))

    def output(self, layer: int, states: "torch.Tensor", output: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.zeros_like(output)
