"""The treatments that there are, one line each, in the order in which they are applied to a KV group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sa_convert.domain.geometry import Head, ModelGeometry
from sa_convert.domain.plan import Plan
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.drop.treatment import DropTreatment
from sa_convert.treatments.linear.treatment import LinearTreatment
from sa_convert.treatments.low_rank.treatment import LowRankTreatment
from sa_convert.treatments.merge.treatment import MergeTreatment
from sa_convert.treatments.share.treatment import ShareTreatment
from sa_convert.treatments.window.treatment import WindowTreatment

_TREATMENTS: tuple[Treatment, ...] = (
    WindowTreatment(),
    LowRankTreatment(),
    ShareTreatment(),
    MergeTreatment(),
    LinearTreatment(),
    DropTreatment(),
)  # fmt: skip

SEARCHED = ("share",)
"""What a search for a part of the keys uses unless a recipe says otherwise."""

SEARCHED_FOR_CACHE = ("window", "share")
"""What a search for a part of the whole cache uses, of those that there are."""

_MORE: ContextVar[tuple[Treatment, ...]] = ContextVar("more treatments", default=())


def treatments() -> tuple[Treatment, ...]:
    """All of them."""
    return (*_TREATMENTS, *_MORE.get())


def named(name: str) -> Treatment | None:
    """The treatment of this name, or None."""
    return next((treatment for treatment in treatments() if treatment.name == name), None)


def used_in(plan: Plan) -> tuple[Treatment, ...]:
    """Those that a plan uses, in the order in which they are applied. All that it names must be known."""
    names = plan.treatments
    return tuple(treatment for treatment in treatments() if treatment.name in names)


def runtime_files() -> dict[str, Path]:
    """The code of each treatment that travels with a model."""
    return {treatment.name: treatment.runtime_file for treatment in treatments()}


def searched(names: Sequence[str] | None = None) -> tuple[Treatment, ...]:
    """Those of these names, that a search may use; None: those that it uses unless it is told otherwise."""
    return tuple(treatment for treatment in treatments() if treatment.name in (names or SEARCHED))


def refittable(plan: Plan) -> bool:
    """Whether a fit of the output projections may repair what the plan costs, and fits their shapes."""
    used = used_in(plan)
    return any(one.refits for one in used) and all(one.refits or one.keeps_outputs(plan) for one in used)


def lenders(plan: Plan, geometry: ModelGeometry) -> list[tuple[int, Head]]:
    """For each query head that uses the scores of another one under a plan: its layer, and that other one."""
    return [pair for treatment in used_in(plan) for pair in treatment.lenders(plan, geometry)]


@contextmanager
def also(*more: Treatment) -> Iterator[None]:
    """While open, there are these treatments, too: of a package of the user's own, or of a test."""
    token = _MORE.set((*_MORE.get(), *more))
    try:
        yield
    finally:
        _MORE.reset(token)
