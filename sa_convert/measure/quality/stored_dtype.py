"""Both models once more, in the dtype of their files: validation computes in float32 if it can, users in theirs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from sa_convert.domain.report import StoredPerplexity
from sa_convert.errors import GateRefused
from sa_convert.measure.quality.perplexity import Perplexity, perplexity
from sa_convert.models.load import Loaded, release_memory
from sa_convert.models.placement import Placement
from sa_convert.models.task import Task

SEQUENCES = 2
ROUNDING = 0.01
"""How much more of its perplexity a converted model may lose by rounding than its base: 0.01 is 1%."""

Load = Callable[[Placement], AbstractContextManager[Loaded]]


def is_wider(placement: Placement) -> bool:
    """Whether the models are computed in another dtype than they are stored in."""
    return placement.dtype != placement.stored


def first(model: object, tokens: torch.Tensor, task: Task, who: str) -> Perplexity:
    """Perplexity on the few sequences that are compared."""
    return perplexity(model, tokens[:SEQUENCES], f"perplexity of the {who} model, first sequences", task=task)


def in_stored_dtype(load: Load, placement: Placement, *, tokens: torch.Tensor, task: Task, who: str) -> Perplexity:
    """As `first`, with the model loaded in the dtype of its files."""
    with load(replace(placement, dtype=placement.stored)) as loaded:
        measured = first(loaded.model, tokens, task, who)
        del loaded
    release_memory()
    return measured


def compared(
    placement: Placement, exact: tuple[Perplexity, Perplexity], stored: tuple[Perplexity, Perplexity]
) -> StoredPerplexity | None:
    """exact, stored: of the base model and of the converted one, on the same sequences. None if the base model is not
    finite in its own dtype: nothing can be said then.

    Raises GateRefused if the converted model is not finite where its base is, or loses by rounding what it does not.
    """
    name = str(placement.stored).removeprefix("torch.")
    if not stored[0].finite:
        return None
    if not stored[1].finite:
        raise GateRefused(
            f"The converted model's perplexity is not finite in {name}, the dtype of its files, though the base "
            f"model's is, and in {placement.dtype_name} both are: convert the model in a wider dtype."
        )
    report = StoredPerplexity(name, stored[0].tokens, *(one.perplexity for pair in (stored, exact) for one in pair))
    if report.rounding > ROUNDING:
        raise GateRefused(
            f"In {name}, the dtype of its files, the converted model loses {report.rounding:.1%} of perplexity more by "
            f"rounding than its base (limit {ROUNDING:.0%}): convert the model in a wider dtype, or share less."
        )
    return report
