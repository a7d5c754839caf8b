"""Sharing, tried on a base model that runs: heads use the probabilities of their sources."""

from typing import TYPE_CHECKING

from sa_convert.domain.geometry import Head
from sa_convert.domain.plan import Plan
from sa_convert.domain.stacks import in_stack, layer_of
from sa_convert.treatments.share.plans import NAME
from sa_convert.treatments.trial import Lent, Trial

if TYPE_CHECKING:
    import torch


class ShareTrial(Trial):
    """borrowed: by layer and query head, the source."""

    def __init__(self, plan: Plan) -> None:
        self.borrowed: dict[int, dict[int, Head]] = {}
        for layer, groups in plan.groups_of(NAME).items():
            stack = in_stack(plan.stacks, layer).stack
            self.borrowed[layer] = {
                group * len(sources) + at: (layer_of(plan.stacks, stack, source[0]), source[1])
                for group, sources in groups.items()
                for at, source in enumerate(sources)
                if source is not None
            }
        self.lenders = frozenset(layer for heads in self.borrowed.values() for layer, _ in heads.values())

    def probabilities(self, layer: int, own: "torch.Tensor", lent: Lent, groups: int) -> "torch.Tensor":
        import torch

        if layer not in self.borrowed:
            return own
        heads = list(own.unbind(1))
        for head, source in self.borrowed[layer].items():
            heads[head] = lent(source[0])[:, source[1]].to(own.device)
        return torch.stack(heads, dim=1)
