"""The table of the model card that tells what was saved."""

from collections.abc import Iterator

from sa_convert.console.amounts import human_bytes
from sa_convert.domain.change import Change
from sa_convert.domain.report import Report


def savings_table(report: Report) -> Iterator[str]:
    """Lines of a table: sizes before and after."""
    savings = report.savings
    sizes = [human_bytes(savings.checkpoint_bytes.before), human_bytes(savings.checkpoint_bytes.after)]
    measured = "measured" if report.perplexity is not None else "computed, not measured"
    yield "| | base model | this model | change |"
    yield "|---|---|---|---|"
    yield _line("parameters", savings.parameters)
    yield _line("weight files", savings.checkpoint_bytes, *sizes)
    if report.caches:
        yield _line(f"cache bytes per token ({measured})", savings.cache_bytes_per_token)
    keys = "keys in the cache" if report.caches else "keys (the model caches nothing)"
    yield f"| {keys} | | | {-savings.key_cache_removed:+.1%} |"


def _line(label: str, change: Change, *texts: str) -> str:
    before, after = texts or (f"{change.before:,}", f"{change.after:,}")
    return f"| {label} | {before} | {after} | {-change.removed:+.1%} |"
