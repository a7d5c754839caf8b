"""Low-rank keys, tried on a base model that runs."""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.treatments.low_rank.learned import learned
from sa_convert.treatments.trial import Trial, Turned

if TYPE_CHECKING:
    import torch

NAME = "low_rank"


class LowRankTrial(Trial):
    """groups: arguments by layer and KV group."""

    def __init__(self, plan: Plan) -> None:
        self.groups, self.learned = plan.groups_of(NAME), learned()

    def key(self, layer: int, key: "torch.Tensor", turned: Turned) -> "torch.Tensor":
        import torch

        if layer not in self.groups:
            return key
        keys = list(key.unbind(1))
        for group, told in self.groups[layer].items():
            basis = self.learned.basis(layer, group, told["keys"])
            back = turned(key[:, group : group + 1].float(), True)
            keys[group] = turned(basis.reduced(back), False)[:, 0].to(key.dtype)
        return torch.stack(keys, dim=1)
