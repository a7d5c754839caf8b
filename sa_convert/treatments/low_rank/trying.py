"""Low-rank keys, tried on a base model that runs."""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.treatments.low_rank.learned import learned
from sa_convert.treatments.trial import Trial

if TYPE_CHECKING:
    import torch

NAME = "low_rank"


class LowRankTrial(Trial):
    """groups: arguments by layer and KV group."""

    def __init__(self, plan: Plan) -> None:
        self.groups, self.learned = plan.groups_of(NAME), learned()

    def key(self, layer: int, key: "torch.Tensor") -> "torch.Tensor":
        import torch

        if layer not in self.groups:
            return key
        keys = list(key.unbind(1))
        for group, told in self.groups[layer].items():
            basis = self.learned.basis(layer, group, told["keys"])
            back = self.turned(layer, key[:, group : group + 1].float(), back=True)
            keys[group] = self.turned(layer, basis.reduced(back), back=False)[:, 0].to(key.dtype)
        return torch.stack(keys, dim=1)
