"""The tables of the model card: what is shared, and what that saves."""

from collections.abc import Iterator
from itertools import groupby

from sa_convert.console.amounts import human_bytes
from sa_convert.domain.report import Change, Report
from sa_convert.domain.sharing_map import Source
from sa_convert.domain.stacks import Stacks, layer_label, layer_names, place_of


def sharing_table(report: Report) -> Iterator[str]:
    """Lines of a table: which layers reuse the attention of which."""
    yield "| layers | query heads that reuse | source layers |"
    yield "|---|---|---|"
    stacks = report.sharing.stacks
    rows = [(layer, _heads(row), _sources(row, stacks)) for layer, row in report.sharing.layers.items()]
    # Layers of a stack that follow each other and share alike are one line.
    indexed = groupby(
        enumerate(rows), lambda item: (place_of(stacks, item[1][0])[0], item[1][0] - item[0], item[1][1:])
    )
    for (_, _, (heads, sources)), group in indexed:
        yield f"| {layer_names(stacks, [row[0] for _, row in group])} | {heads} | {sources} |"


def _heads(row: tuple[Source | None, ...]) -> str:
    reusing = sum(source is not None for source in row)
    return f"all {len(row)}" if reusing == len(row) else f"{reusing} of {len(row)}"


def _sources(row: tuple[Source | None, ...], stacks: Stacks) -> str:
    """Source layers, and whether head i uses head i."""
    used = [(head, source) for head, source in enumerate(row) if source is not None]
    layers = ", ".join(layer_label(stacks, layer) for layer in sorted({source[0] for _, source in used}))
    return f"{layers} (same heads)" if all(head == source[1] for head, source in used) else layers


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


def uncached(report: Report) -> Iterator[str]:
    """What the table does not say: where there is no cache, sharing saves something else."""
    saved = "parameters, and the computation of queries, keys and attention weights"
    names = [name for name, _ in report.sharing.stacks]
    if not report.caches:
        yield f"The model caches nothing: what sharing saves are {saved}."
    elif "encoder" in names:
        yield (
            f"The encoder caches nothing: what sharing saves there are {saved}. The cache is that of one token read by "
            "the encoder (cross-attention) and one written by the decoder."
        )


def _line(label: str, change: Change, *texts: str) -> str:
    before, after = texts or (f"{change.before:,}", f"{change.after:,}")
    return f"| {label} | {before} | {after} | {-change.removed:+.1%} |"
