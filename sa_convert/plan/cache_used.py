"""The cache of a converted model at the length that it is for: as measured, and what could not be measured computed."""

from sa_convert.domain.change import CacheBytes
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.domain.report import Validation
from sa_convert.plan.savings import cache_at, cache_change


def cache_used(model: Model, plan: Plan, at: int, validation: Validation | None) -> CacheBytes | None:
    """Of one sequence of `at` tokens; None if the model caches nothing.

    If validation filled a cache with fewer tokens, the plan says what the others add. Without validation it says all.
    """
    computed = cache_change(model, plan, at)
    if not computed.before:
        return None
    measured = validation.cache if validation else None
    if measured is None:
        return computed
    before, after = measured.before, measured.after
    if measured.at < at:
        before += cache_at(model, Plan(), at) - cache_at(model, Plan(), measured.at)
        after += cache_at(model, plan, at) - cache_at(model, plan, measured.at)
    return CacheBytes(before, after, at, min(measured.at, at), measured.room)
