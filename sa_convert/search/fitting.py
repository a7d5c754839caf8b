"""What treatments fit on calibration text: first what trials and costs are made with, at last the tensors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sa_convert.console.progress import progress
from sa_convert.domain.fitted import Fitted
from sa_convert.domain.plan import Plan
from sa_convert.models.processes import in_share, shared
from sa_convert.observe.gradients import pass_over
from sa_convert.observe.sequences import Sample
from sa_convert.search.choose import some
from sa_convert.search.scoring import observe
from sa_convert.treatments.base import Treatment
from sa_convert.treatments.registry import used_in

if TYPE_CHECKING:
    from sa_convert.observe.session import Session

LEARNED = 8
"""Sequences that treatments learn from. What they learn depends on the model, the recipe's text and the seed alone, so
that a plan that is spelled out gives the same tensors as the search that has found it."""


def learn(session: "Session", plan: Plan | None) -> None:
    """Let the treatments of a plan, or those of a search (None), see the base model run, if they fit anything."""
    among: Sequence[Treatment] = session.treatments if plan is None else used_in(plan)
    for treatment in among:
        treatment.prepare(session, plan)
    lessons = [lesson for treatment in among if (lesson := treatment.learner(session.units)) is not None]
    if not lessons:
        return
    samples = some(session.samples.fit, LEARNED)
    total = sum(sample.weight for sample in samples)
    generator = torch.Generator().manual_seed(session.seed)

    def passed_over(sample: Sample) -> None:
        pass_over(session.probe, sample, generator, session.measure)

    with progress(in_share(samples), "bases", unit="seq") as bar:
        for _, sample in shared(samples, passed_over):
            seen = observe(
                session.probe,
                session.units,
                sample,
                Plan(),
                measure=session.measure,
                generator=generator,
                total=total,
            )
            for observed in seen:
                for lesson in lessons:
                    lesson(observed)
            bar.update()
    for treatment in among:
        treatment.join()


def fit(session: "Session", plan: Plan) -> Fitted:
    """The tensors of all treatments of a plan that fit some."""
    found = [treatment.fit(session, plan) for treatment in used_in(plan) if treatment.fits]
    return Fitted(
        {name: tensor for one in found for name, tensor in one.tensors.items()},
        {name: before for one in found for name, before in one.after.items()},
    )
