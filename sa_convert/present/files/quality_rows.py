"""What long context costs, before and after, as rows of a table: for the card and for the terminal."""

from collections.abc import Iterator
from typing import NamedTuple

from sa_convert.console.amounts import with_error
from sa_convert.domain.losses import LossChange
from sa_convert.domain.report import Report


class QualityRow(NamedTuple):
    """Texts of the cells. change: with its standard error."""

    label: str
    before: str
    after: str
    change: str


def quality_rows(report: Report) -> Iterator[QualityRow]:
    """Long text by position, copying by distance, needles; nothing of what was not measured."""
    long = report.long
    if long is not None:
        yield _perplexity(f"perplexity of {long.before.length:,} tokens", long.texts)
        for start, stop, change in long.positions:
            yield _perplexity(f"tokens {start:,} to {stop - 1:,}", change)
    copying = report.copying
    if copying is not None and (long is not None or len(copying.distances) > 1):
        for distance, change in copying.distances:
            yield _loss(f"copying, {distance:,} tokens back", change)
    if long is not None:
        for depth, change in long.needle:
            yield _loss(f"needle at {depth} of the text", change)


def _perplexity(label: str, change: LossChange) -> QualityRow:
    before, after = (f"{losses.perplexity:.3f}" for losses in (change.before, change.after))
    return QualityRow(label, before, after, with_error(f"{change.increase:+.2%}", change.increase_error, ".2%"))


def _loss(label: str, change: LossChange) -> QualityRow:
    before, after = (f"{losses.mean:.3f}" for losses in (change.before, change.after))
    return QualityRow(label, before, after, with_error(f"{change.rise.value:+.3f}", change.rise.error, ".3f"))
