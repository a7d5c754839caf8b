"""Windows, tried on a base model that runs: probabilities of keys out of reach are gone, the others grow for them."""

from typing import TYPE_CHECKING

from sa_convert.domain.plan import Plan
from sa_convert.treatments.trial import Lent, Trial

if TYPE_CHECKING:
    import torch

NAME = "window"


class WindowTrial(Trial):
    """windows: by layer and KV group, its arguments. Sequences have no padding."""

    def __init__(self, plan: Plan) -> None:
        self.windows = plan.groups_of(NAME)

    def probabilities(self, layer: int, own: "torch.Tensor", lent: Lent, groups: int) -> "torch.Tensor":
        import torch

        if layer not in self.windows:
            return own
        size = own.shape[1] // groups
        heads = list(own.split(size, dim=1))
        for group, window in self.windows[layer].items():
            seen = in_reach(own.shape[-2], own.shape[-1], window["sinks"], window["tokens"]).to(own.device)
            heads[group] = windowed(heads[group], seen)
        return torch.cat(heads, dim=1)


def in_reach(tokens: int, length: int, sinks: int, window: int) -> "torch.Tensor":
    """(T, S) bool: which of `length` keys, all of real tokens, each of the last `tokens` queries may see."""
    import torch

    queries = torch.arange(length - tokens, length)[:, None]
    keys = torch.arange(length)[None]
    return (keys <= queries) & ((queries - keys < window) | (keys < sinks))


def windowed(probabilities: "torch.Tensor", seen: "torch.Tensor") -> "torch.Tensor":
    """Probabilities (..., T, S) of a softmax over `seen` (T, S) alone. What they lack to 1 went to a learned sink,
    which takes its share again."""
    rest = (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0)
    kept = probabilities * seen
    return kept / (kept.sum(-1, keepdim=True) + rest).clamp(min=1e-30)
