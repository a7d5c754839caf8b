"""The search: a sharing map for a budget, from costs that are measured again as units go."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa_convert.calibrate.budget import too_much
from sa_convert.calibrate.measure import Reference
from sa_convert.calibrate.scoring import collect
from sa_convert.calibrate.search import State
from sa_convert.calibrate.sequences import Sample
from sa_convert.data.calibrated import Distance
from sa_convert.data.sharing_map import SharingMap

if TYPE_CHECKING:
    from sa_convert.calibrate.session import Session
    from sa_convert.data.recipe import Origin, Search

ROUND = 0.1
"""Part of the key cache after which costs are measured again."""

SWAPS = 3

ROUND_SAMPLES = 2
"""After the first round, one text sample in so many is measured again."""


@dataclass(frozen=True)
class Step:
    """A map on the way to the budget. removed: the part of the key cache that it saves. estimate: expected rise of the
    loss by the costs; measured: on held-out samples, or None where it was not measured."""

    sharing: SharingMap
    removed: float
    estimate: float
    measured: Distance | None = None


def path(session: "Session", parts: list[float], reference: Reference | None) -> Iterator[Step]:
    """Maps that save `parts` of the key cache, ascending; each starts from the one before. Ends early where no more can
    be saved. reference: measures each step that is kept."""
    sharing, estimate = SharingMap({}), 0.0
    for number, part in enumerate(parts):
        samples = session.samples.fit if number == 0 else fewer(session.samples.fit, number)
        costs = collect(
            session.probe, session.units, samples, sharing, session.measure, session.seed + number,
            f"costs, round {number + 1} of {len(parts)}",
        )  # fmt: skip
        state = State(costs, sharing)
        if number:
            state.rematch()
        complete = state.extend(part)
        for _ in range(SWAPS if number else 0):
            if not state.swap():
                break
        if state.sharing == sharing:
            return
        sharing, estimate = state.sharing, estimate + state.estimate
        measured = reference.measure(sharing.layers, f"round {number + 1} on held-out text") if reference else None
        yield Step(sharing, session.units.removed_keys(session.units.from_map(sharing)), estimate, measured)
        if not complete:
            return


def fewer(samples: tuple[Sample, ...], number: int) -> list[Sample]:
    """Every ROUND_SAMPLES-th of the text, others in every round, and of the repetitions."""
    text = [sample for sample in samples if not sample.repetition]
    repeated = [sample for sample in samples if sample.repetition]
    return text[number % ROUND_SAMPLES :: ROUND_SAMPLES] + repeated[number % ROUND_SAMPLES :: ROUND_SAMPLES]


def rounds(part: float) -> list[float]:
    """Equal steps of about ROUND up to `part`."""
    count = max(1, math.floor(part / ROUND + 0.5))
    return [part * (number + 1) / count for number in range(count)]


def search_map(session: "Session", search: "Search", reference: Reference, origin: "Origin", refits: bool) -> Step:
    """The map for a recipe's search. refits: a refit follows, so a limit on perplexity holds for the model after it.

    reference: of the held-out samples. Raises RecipeError where the search cannot reach its aim.
    """
    if search.key_cache is not None:
        return _for_key_cache(session, search.key_cache, reference, origin)
    assert search.max_perplexity_increase is not None
    from sa_convert.calibrate.within import within_limit

    return within_limit(session, search.max_perplexity_increase, reference, origin, refits)


def _for_key_cache(session: "Session", part: float, reference: Reference, origin: "Origin") -> Step:
    last = None
    for step in path(session, rounds(part), reference):
        last = step
    if last is None or last.removed < part - 1e-9:
        raise too_much(part, last.removed if last else 0.0, origin)
    return last
