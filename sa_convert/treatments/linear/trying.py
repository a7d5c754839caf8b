"""Linear maps in the place of layers' attention, tried on a base model that runs."""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.treatments.linear.learned import learned
from sa_convert.treatments.trial import Trial

if TYPE_CHECKING:
    import torch

NAME = "linear"


class LinearTrial(Trial):
    """The output of these layers' attention is a map of what goes into it."""

    def __init__(self, plan: Plan) -> None:
        self.whole_layers = frozenset(plan.layers_of(NAME))

    def output(self, layer: int, states: "torch.Tensor", output: "torch.Tensor") -> "torch.Tensor":
        return learned().maps[layer].of(states)
