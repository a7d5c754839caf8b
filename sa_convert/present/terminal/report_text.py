"""How a report is shown in a terminal."""

from collections.abc import Callable, Iterator

from sa_convert.console.amounts import human_bytes, human_count
from sa_convert.domain.change import Change, Savings
from sa_convert.domain.report import TASK_NAMES, CopyingReport, DecodeCheck, Report
from sa_convert.present.files.quality_rows import quality_rows
from sa_convert.present.files.report_file import heal_summary, limits_text, measured, refit_summary
from sa_convert.present.terminal.aligned import aligned


def render_report(report: Report) -> str:
    """The report as an aligned table for a terminal, without a final newline."""
    return aligned(_rows(report))


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    revision = f" at {report.base_model.revision}" if report.base_model.revision else ""
    yield "Base model", f"{report.base_model.id}{revision} ({report.family})"
    if report.recipe:
        yield "Recipe", report.recipe
    if stock := report.stock:
        yield "Written for", f"{stock.summary}{f', {stock.options}' * bool(stock.options)}"
    for treated in report.used:
        yield treated.label, treated.summary
    savings = report.savings
    yield "Parameters", change_text(savings.parameters, human_count)
    yield "Checkpoint", change_text(savings.checkpoint_bytes, human_bytes)
    how = "measured" if report.perplexity else "computed from the map"
    if report.caches:
        over = f", average over {savings.cache_over:,} tokens" if savings.cache_over else ""
        change = change_text(savings.cache_bytes_per_token, lambda size: f"{size:,} bytes")
        yield "Cache per token", f"{change}{over}, {how}"
        if report.cache is not None and savings.cache_over:
            change = change_text(report.cache, human_bytes)
            yield f"Cache at {report.cache.at:,}", f"{change}, {measured(report.cache)}"
            yield "Cache saved", f"{caches_text(savings)} (computed)"
        if savings.key_cache_removed or not savings.cache_over:
            yield "Key cache", f"{savings.key_cache_removed:.1%} removed"
    else:
        yield "Cache per token", "none: the model caches nothing"
        yield "Keys", f"{savings.key_cache_removed:.1%} no longer computed"
    if report.refit:
        yield "Refit", refit_summary(report.refit)
    if report.heal:
        yield "Healing", heal_summary(report.heal)
    if report.perplexity is None:
        yield "Quality", "not measured (--no-validate)"
        return
    perplexity, check = report.perplexity, report.decode_check
    change = f"{perplexity.before:.3f} -> {perplexity.after:.3f} ({perplexity.increase:+.2%})"
    yield f"Perplexity{TASK_NAMES[perplexity.task]}", f"{change}, {perplexity.tokens:,} tokens in {perplexity.dtype}"
    if stored := perplexity.stored:
        change = f"{stored.before:.3f} -> {stored.after:.3f} ({stored.after / stored.before - 1:+.2%})"
        yield f"In {stored.dtype}", f"{change}, {stored.tokens:,} tokens; {stored.rounding:+.2%} by rounding"
    yield "Text", perplexity.text
    if report.agreement:
        kl, top1 = f"{report.agreement.kl:.4f} nats", f"{report.agreement.top1:.1%}"
        yield "Agreement", f"KL divergence {kl}, same most likely token {top1}, {report.agreement.tokens:,} tokens"
    if report.copying:
        yield "Copying", _copying_summary(report.copying)
    for row in quality_rows(report):
        yield row.label.capitalize(), f"{row.before} -> {row.after} ({row.change})"
    yield "Decode check", _decode_summary(check) if check else "none: the model caches nothing"
    if report.gate:
        yield (
            "Gate",
            f"{'passed' if report.gate.passed else 'REFUSED'}: perplexity may rise by {limits_text(report.gate)}",
        )


def _decode_summary(check: DecodeCheck) -> str:
    same = "same greedy tokens" if check.same_greedy_tokens else "OTHER GREEDY TOKENS"
    difference = f"{check.max_abs_logit_difference:.2g} (tolerance {check.tolerance:.2g})"
    return f"{'passed' if check.passed else 'FAILED'}: logits differ by at most {difference}, {same}"


def _copying_summary(copying: CopyingReport) -> str:
    """Such as "loss 1.66 -> 1.85 nats (+0.19), 3,072 tokens at distance 128"."""
    change = f"{copying.before:.2f} -> {copying.after:.2f} nats ({copying.increase:+.2f})"
    return f"loss {change}, {copying.tokens:,} tokens at distance {copying.period}"


def caches_text(savings: Savings) -> str:
    """Such as "0.0% of 512 tokens, 37.5% of 2,048"."""
    shown = [f"{change.removed:.1%} of {change.at:,}" for change in savings.caches]
    return ", ".join([f"{shown[0]} tokens", *shown[1:]])


def change_text(change: Change, show: Callable[[int], str]) -> str:
    """Such as "269.1 MB -> 250.0 MB (-7.1%)"."""
    return f"{show(change.before)} -> {show(change.after)} ({0 - change.removed:+.1%})"
