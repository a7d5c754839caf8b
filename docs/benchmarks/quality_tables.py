"""Tables of the page, from the results of the benchmark."""

import math
from statistics import fmean, stdev
from typing import Any

from quality_text import IN_DOMAIN, OUT_OF_DOMAIN

METHODS = {
    "paper": "the paper's spans",
    "ours": "ours, no refit",
    "ours, refit": "ours, refit",
    "drop": "attention deleted (LLM-Drop)",
    "linear": "attention made linear (NBL)",
}
# Okabe and Ito's colours, told apart with every kind of colour vision; shapes say the same once more.
STYLES = {
    "paper": ("#D55E00", "s", "-"),
    "ours": ("#56B4E9", "o", "--"),
    "ours, refit": ("#0072B2", "o", "-"),
    "drop": ("#000000", "v", ":"),
    "linear": ("#009E73", "D", "-."),
}
# Part of the key cache, and by how much perplexity out of domain and (in nats) copying may rise.
TARGETS = {10.0: (0.025, 0.1), 25.0: (0.08, 0.4), 40.0: (0.25, None)}
RATIO_TARGET = 4

Row = dict[str, Any]


def rises(results: Row, row: Row, domains: tuple[str, ...]) -> list[float]:
    """Nats by which each sequence of these domains lost more than with the base model."""
    base = results["base"]["losses"]
    return [
        after - before for domain in domains for before, after in zip(base[domain], row["losses"][domain], strict=True)
    ]


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def ratio(results: Row, row: Row, other: Row) -> tuple[float, float]:
    """How many times more nats `other` loses out of domain, and the standard error (of paired sequences)."""
    ours, theirs = rises(results, row, OUT_OF_DOMAIN), rises(results, other, OUT_OF_DOMAIN)
    found = fmean(theirs) / fmean(ours)
    _, error = mean_error([b - found * a for a, b in zip(ours, theirs, strict=True)])
    return found, error / abs(fmean(ours))


def saved(results: Row, row: Row) -> float:
    """The part of all cache bytes that is gone."""
    return 1 - row["cache_bytes_per_token"] / results["base"]["cache_bytes_per_token"]


def increase(results: Row, row: Row, domains: tuple[str, ...]) -> float:
    """Of the perplexity: 0.05 is 5%."""
    return math.exp(fmean(rises(results, row, domains))) - 1


def nats(results: Row, row: Row, *domains: str) -> str:
    mean, error = mean_error(rises(results, row, domains))
    return f"{mean:+.3f} ± {error:.3f}"


def by_budget(results: Row) -> list[Row]:
    """Rows from little saved to much; at the same budget in the order of METHODS."""
    order = list(METHODS)
    return sorted(results["rows"], key=lambda row: (row["budget"], order.index(row["method"]), saved(results, row)))


def main_table(results: Row) -> str:
    lines = [
        "| method | cache saved | perplexity, other domains | perplexity, built-in text | copying | parameters |",
        "|---|---|---|---|---|---|",
    ]
    before = results["base"]["parameters"]
    budget = None
    for row in by_budget(results):
        if budget not in (None, row["budget"]):
            lines.append("| | | | | | |")
        budget = row["budget"]
        lines.append(
            f"| {METHODS[row['method']]}: {row['what']} | {saved(results, row):.1%} "
            f"| {increase(results, row, OUT_OF_DOMAIN):+.1%} | {increase(results, row, (IN_DOMAIN,)):+.1%} "
            f"| {nats(results, row, 'copying')} | {row['parameters'] / before - 1:+.1%} |"
        )
    return "\n".join(lines)


def detail_table(results: Row) -> str:
    heads = [*OUT_OF_DOMAIN, "both", IN_DOMAIN]
    lines = [
        f"| method | key cache gone | cache, bytes a token | parameters | {' | '.join(heads)} | seconds to make |",
        f"|---|---|---|---|{'---|' * len(heads)}---|",
    ]
    for row in by_budget(results):
        losses = [nats(results, row, name) for name in OUT_OF_DOMAIN]
        losses += [nats(results, row, *OUT_OF_DOMAIN), nats(results, row, IN_DOMAIN)]
        lines.append(
            f"| {METHODS[row['method']]}: {row['what']} | {row['key_cache_removed']:.1%} "
            f"| {row['cache_bytes_per_token']:,} | {row['parameters']:,} | {' | '.join(losses)} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def target_table(results: Row) -> str:
    lines = [
        "| key cache | perplexity, other domains | target | copying, nats | target |",
        "|---|---|---|---|---|",
    ]
    for budget, (text, copying) in TARGETS.items():
        for row in by_budget(results):
            if row["method"] == "ours, refit" and row["budget"] == budget:
                rise = increase(results, row, OUT_OF_DOMAIN)
                copied = fmean(rises(results, row, ("copying",)))
                limit = "none" if copying is None else f"{copying:.1f}: {verdict(copied <= copying)}"
                lines.append(
                    f"| {budget:g}% | {rise:+.1%} | {text:+.1%}: {verdict(rise <= text)} | {copied:+.3f} | {limit} |"
                )
    return "\n".join(lines) if len(lines) > 2 else ""


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def ratio_table(results: Row) -> str:
    """Every row of ours beside the paper's that removes nearly as much of the key cache, and never more."""
    lines = [
        "| ours | key cache gone | the paper's spans | key cache gone | nats lost, paper's / ours |",
        "|---|---|---|---|---|",
    ]
    spans = [row for row in results["rows"] if row["method"] == "paper"]
    for row in by_budget(results):
        less = [other for other in spans if other["key_cache_removed"] <= row["key_cache_removed"] + 1e-6]
        if row["method"].startswith("ours") and less:
            other = max(less, key=lambda other: other["key_cache_removed"])
            found, error = ratio(results, row, other)
            lines.append(
                f"| {METHODS[row['method']]}: {row['what']} | {row['key_cache_removed']:.1%} | {other['what']} "
                f"| {other['key_cache_removed']:.1%} | {found:.1f} ± {error:.1f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""
