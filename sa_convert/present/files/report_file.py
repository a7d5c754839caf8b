"""Writes report.json, and shows the report in a terminal."""

import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sa_convert.console.amounts import format_percent, human_bytes, human_count
from sa_convert.domain.calibrated import RefitReport
from sa_convert.domain.report import TASK_NAMES, Change, CopyingReport, DecodeCheck, Report
from sa_convert.present.terminal.aligned import aligned

FILE = "report.json"


def write_report(report: Report, folder: Path) -> Path:
    """Write report.json: no times and nothing of this machine, so that equal conversions give equal files."""
    path = folder / FILE
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(_on_one_line(text) + "\n", encoding="utf-8", newline="\n")
    return path


def _on_one_line(text: str) -> str:
    """JSON with each list on one line: a sharing map has a list for every head. No string holds a line break."""
    pairs = re.sub(r"\[\n\s+(\d+),\n\s+(\d+)\n\s+\]", r"[\1, \2]", text)
    return re.sub(r"\[\n\s+([^{}]*?)\n\s+\]", lambda row: "[" + re.sub(r"\n\s+", " ", row[1]) + "]", pairs)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that made and checked the folder, without importing any."""
    import sa_convert

    versions = {"sa_convert": sa_convert.__version__}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package).partition("+")[0]  # without the build, such as +cpu
        except PackageNotFoundError:  # a checkout on the path instead of an installed package
            continue
    return versions


def render_report(report: Report) -> str:
    """The report as an aligned table for a terminal, without a final newline."""
    return aligned(_rows(report))


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    revision = f" at {report.base_model.revision}" if report.base_model.revision else ""
    yield "Base model", f"{report.base_model.id}{revision} ({report.family})"
    if report.recipe:
        yield "Recipe", report.recipe
    for treated in report.used:
        yield treated.label, treated.summary
    savings = report.savings
    yield "Parameters", _change(savings.parameters, *map(human_count, _values(savings.parameters)))
    yield "Checkpoint", _change(savings.checkpoint_bytes, *map(human_bytes, _values(savings.checkpoint_bytes)))
    per_token = [f"{value:,} bytes" for value in _values(savings.cache_bytes_per_token)]
    how = "measured" if report.perplexity else "computed from the map"
    if report.caches:
        yield "Cache per token", f"{_change(savings.cache_bytes_per_token, *per_token)}, {how}"
        yield "Key cache", f"{savings.key_cache_removed:.1%} removed"
    else:
        yield "Cache per token", "none: the model caches nothing"
        yield "Keys", f"{savings.key_cache_removed:.1%} no longer computed"
    if report.refit:
        yield "Refit", refit_summary(report.refit)
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
        yield "Copying", copying_summary(report.copying)
    yield "Decode check", _decode_summary(check) if check else "none: the model caches nothing"
    if report.gate:
        limit = format_percent(report.gate.max_perplexity_increase)
        yield "Gate", f"{'passed' if report.gate.passed else 'REFUSED'}: perplexity may rise by {limit}"


def _decode_summary(check: DecodeCheck) -> str:
    same = "same greedy tokens" if check.same_greedy_tokens else "OTHER GREEDY TOKENS"
    difference = f"{check.max_abs_logit_difference:.2g} (tolerance {check.tolerance:.2g})"
    return f"{'passed' if check.passed else 'FAILED'}: logits differ by at most {difference}, {same}"


def refit_summary(refit: RefitReport) -> str:
    """Such as "9 of 12 output projections, divergence on held-out text 0.1100 -> 0.0900 nats"."""
    if not refit.share:
        return "left out, since it did not help on held-out text"
    kept = sum(layer.strength is not None for layer in refit.layers.values())
    share = "" if refit.share == 1 else f", {format_percent(refit.share)} of the way"
    change = f"{refit.before.divergence:.4f} -> {refit.after.divergence:.4f} nats"
    return f"{kept} of {len(refit.layers)} output projections{share}; divergence on held-out text {change}"


def copying_summary(copying: CopyingReport) -> str:
    """Such as "loss 1.66 -> 1.85 nats (+0.19), 3,072 tokens at distance 128"."""
    change = f"{copying.before:.2f} -> {copying.after:.2f} nats ({copying.increase:+.2f})"
    return f"loss {change}, {copying.tokens:,} tokens at distance {copying.period}"


def _values(change: Change) -> tuple[int, int]:
    return change.before, change.after


def _change(change: Change, before: str, after: str) -> str:
    return f"{before} -> {after} ({-change.removed:+.1%})"
