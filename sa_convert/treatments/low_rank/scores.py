"""What a change of scores does to a loss, of one layer in a pass over a sequence.

Letters in shape comments: T tokens, S tokens seen, H query heads, G KV groups, D head size.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sa_convert.treatments.ledger import Observed


def gradient_of_scores(observed: "Observed") -> "torch.Tensor":
    """(H, T, S): of the loss at each score, p (v . u - o . u) with u the gradient at the head's output o."""
    import torch

    gradient = observed.gradient.float().transpose(0, 1)  # (H, T, D)
    heads = len(gradient)
    own = observed.probabilities[:, -heads:].transpose(0, 1)  # those of earlier layers come first
    value = observed.value.float().repeat_interleave(heads // len(observed.value), dim=0)
    at_output = (observed.output.float().transpose(0, 1) * gradient).sum(-1, keepdim=True)
    found: torch.Tensor = own * (torch.matmul(gradient, value.transpose(1, 2)) - at_output)
    return found


def gradient_of_keys(observed: "Observed") -> "torch.Tensor":
    """(G, S, D): of the loss at each key, as the kernel sees it."""
    import torch

    assert observed.key is not None
    assert observed.query is not None
    query = observed.query.float()
    by_head = torch.matmul(gradient_of_scores(observed).transpose(1, 2), query)  # (H, S, D)
    return by_head.unflatten(0, (len(observed.key), -1)).sum(1)


def change_of_loss(observed: "Observed", group: int, scores: "torch.Tensor", change: "torch.Tensor") -> "torch.Tensor":
    """(T,): to first order, by each token's queries, if the keys of a KV group change by so much. scores: the gradient
    at all scores. change: (S, D), of keys as the kernel sees them."""
    import torch

    assert observed.key is not None
    assert observed.query is not None
    size = len(observed.query) // len(observed.key)
    heads = slice(group * size, (group + 1) * size)
    moved = torch.matmul(scores[heads], change)  # (heads of the group, T, D)
    found: torch.Tensor = (moved * observed.query[heads].float()).sum((0, 2))
    return found
