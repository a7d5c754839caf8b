"""The tables of the model card that tell what was saved, and what it costs in long context."""

from collections.abc import Iterator

from sa_convert.console.amounts import human_bytes
from sa_convert.domain.change import CacheBytes, Change
from sa_convert.domain.report import Report
from sa_convert.present.files.quality_rows import quality_rows
from sa_convert.present.files.report_file import measured


def savings_table(report: Report) -> Iterator[str]:
    """Lines of a table: sizes before and after."""
    savings = report.savings
    sizes = [human_bytes(savings.checkpoint_bytes.before), human_bytes(savings.checkpoint_bytes.after)]
    how = "measured" if report.perplexity is not None else "computed, not measured"
    yield "| | base model | this model | change |"
    yield "|---|---|---|---|"
    yield _line("parameters", savings.parameters)
    yield _line("weight files", savings.checkpoint_bytes, *sizes)
    if report.caches:
        over = f", average over {savings.cache_over:,} tokens" if savings.cache_over else ""
        yield _line(f"cache bytes per token{over} ({how})", savings.cache_bytes_per_token)
    if report.cache is not None and savings.cache_over:
        yield _cache(report.cache, measured(report.cache))
        for change in savings.caches:
            if change.at != report.cache.at:
                yield _cache(change, "computed")
    if savings.cache_over and not savings.key_cache_removed:
        return
    keys = "keys in the cache" if report.caches else "keys (the model caches nothing)"
    yield f"| {keys} | | | {-savings.key_cache_removed:+.1%} |"


def quality_table(report: Report) -> list[str]:
    """Lines of a table: quality in long context, before and after; none if it was not measured."""
    rows = list(quality_rows(report))
    if not rows:
        return []
    head = ["| | base model | this model | change |", "|---|---|---|---|"]
    return head + [f"| {row.label} | {row.before} | {row.after} | {row.change} |" for row in rows]


def _cache(change: CacheBytes, how: str) -> str:
    sizes = human_bytes(change.before), human_bytes(change.after)
    return _line(f"cache of {change.at:,} tokens ({how})", change, *sizes)


def _line(label: str, change: Change, *texts: str) -> str:
    before, after = texts or (f"{change.before:,}", f"{change.after:,}")
    return f"| {label} | {before} | {after} | {0 - change.removed:+.1%} |"
