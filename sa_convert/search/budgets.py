"""One search, every budget: the plans on its way are a frontier, with all treatments together and with each alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import stdev
from typing import TYPE_CHECKING

from sa_convert.console.progress import announce
from sa_convert.domain.change import Change
from sa_convert.domain.frontier import Frontier, FrontierPoint
from sa_convert.plan.savings import cache_at
from sa_convert.search.choose import Step
from sa_convert.search.whole_cache import Priced, cache_path

if TYPE_CHECKING:
    from sa_convert.observe.session import Session

PARTS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Parts of the cache for which there is a plan, as far as the treatments reach."""

COPYING = {0.5: 0.1, 1.0: 0.4}
"""Up to which part of the cache a plan may raise the loss of copying by so many nats: as the gates of the shipped
recipes have it."""


def frontier_of(session: "Session", priced: Priced, parts: Sequence[float] = PARTS) -> Frontier:
    """The frontier at the length of `priced`."""
    return Frontier(priced.account.tokens, tuple(_points(session, priced, sorted(parts))))


def _points(session: "Session", priced: Priced, parts: list[float]) -> Iterator[FrontierPoint]:
    for names in _sets(tuple(priced.ledgers)):
        announce(f"frontier of {' and '.join(names)}")
        some = replace(priced, ledgers={name: priced.ledgers[name] for name in names})
        limits = {part: _most_copying(part) for part in parts}
        for part, step in zip(parts, cache_path(some, limits), strict=False):
            yield _point(session, priced, step, names, part)


def _most_copying(part: float) -> float:
    return next(limit for most, limit in COPYING.items() if part <= most + 1e-9)


def _sets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All treatments together, then each alone."""
    yield names
    if len(names) > 1:
        for name in names:
            yield (name,)


def _point(session: "Session", priced: Priced, step: Step, names: tuple[str, ...], part: float) -> FrontierPoint:
    base, measured, model = priced.reference.base, step.measured, session.model
    assert measured is not None
    rises = [after - before for after, before in zip(measured.losses, base.losses, strict=True)]
    periods = [sample.period for sample in priced.reference.samples if sample.repetition]
    copying = zip(periods, measured.copying, base.copying, strict=True)
    alone = "" if names == tuple(priced.ledgers) else f"{names[0].replace('_', '-')}-"
    tokens = priced.account.tokens
    return FrontierPoint(
        treatments=names,
        plan=step.plan,
        cache=Change(cache_at(model, type(step.plan)(), tokens), cache_at(model, step.plan, tokens)),
        loss=measured.loss - base.loss,
        error=stdev(rises) / len(rises) ** 0.5 if len(rises) > 1 else 0.0,
        copying={period: after - before for period, after, before in copying},
        recipe=f"{alone}cache-{f'{100 * part:.6g}'.replace('.', '-')}.yaml",
    )
