"""Low-rank keys and values, tried on a base model that runs."""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.treatments.low_rank.learned import learned
from sa_convert.treatments.low_rank.rules import NAME, Side
from sa_convert.treatments.trial import Trial, Turned

if TYPE_CHECKING:
    import torch


class LowRankTrial(Trial):
    """groups: arguments by layer and KV group."""

    def __init__(self, plan: Plan) -> None:
        self.groups, self.learned = plan.groups_of(NAME), learned()

    def key(self, layer: int, key: "torch.Tensor", turned: Turned) -> "torch.Tensor":
        import torch

        told = self._ranks(layer, "keys")
        if not told:
            return key
        keys = list(key.unbind(1))
        for group, rank in told.items():
            basis = self.learned.basis(layer, group, rank)
            back = turned(key[:, group : group + 1].float(), True)
            keys[group] = turned(basis.reduced(back), False)[:, 0].to(key.dtype)
        return torch.stack(keys, dim=1)

    def value(self, layer: int, value: "torch.Tensor") -> "torch.Tensor":
        import torch

        told = self._ranks(layer, "values")
        if not told:
            return value
        values = list(value.unbind(1))
        for group, rank in told.items():
            reduced = self.learned.basis(layer, group, rank, "values").reduced(values[group].float())
            values[group] = reduced.to(value.dtype)
        return torch.stack(values, dim=1)

    def _ranks(self, layer: int, side: Side) -> dict[int, int]:
        return {group: told[side] for group, told in self.groups.get(layer, {}).items() if side in told}
