"""The model card: README.md of the output folder. It states what was measured, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

from sa_convert.domain.report import TASK_NAMES, Report
from sa_convert.domain.stock import without_code
from sa_convert.families.table import FAMILIES
from sa_convert.present.charts import plan_figure as figure
from sa_convert.present.charts.chart_heal import FILE as HEAL_FIGURE
from sa_convert.present.files.card_metadata import inherited, metadata
from sa_convert.present.files.card_tables import quality_table, savings_table
from sa_convert.present.files.report_file import heal_summary, limits_text, refit_summary

FILE = "README.md"
HUB = "https://huggingface.co"
IN_VLLM = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Families that the plugin for vLLM serves; docs/engines.md has what was run."""
PLACEHOLDER = "PATH_OR_REPO_ID"
"""What the card in a local folder says in place of the name that the model will have on the Hub."""


def write_card(report: Report, recipe_yaml: str, folder: Path, base_card: Path | None = None) -> Path:
    """Write the model card into a folder.

    recipe_yaml: the resolved recipe. base_card: README.md of the base model, whose licence and language are inherited,
    or None. A figure is shown if it lies in the folder.
    """
    name = f"{report.base_model.id.rpartition('/')[2].removesuffix('.gguf')} with shared attention"
    base = report.base_model
    base_metadata, remark = inherited(base_card, f"{HUB}/{base.id}" if base.on_hub else None, folder)
    data = metadata(report, name, base_metadata)
    drawn = figure.file_for(treated.name for treated in report.used)
    shown = drawn.as_posix() if (folder / drawn).is_file() else None
    body = "\n\n".join(_sections(report, name, recipe_yaml, remark, shown))
    path = folder / FILE
    # As huggingface_hub.ModelCard writes it, which takes as long to load as a gigabyte to copy.
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8", newline="\n")
    return path


def for_repository(text: str, repo_id: str, revision: str | None = None) -> str:
    """The text of a card whose lines of code load the model from a repository on the Hub."""
    branch = f', revision="{revision}"' if revision else ""
    served = f" --revision {revision}" if revision else ""
    text = text.replace(f"vllm serve {PLACEHOLDER}", f"vllm serve {repo_id}{served}")
    return text.replace(f'"{PLACEHOLDER}"', f'"{repo_id}"{branch}')


def _sections(report: Report, name: str, recipe: str, remark: str | None, drawn: str | None) -> Iterator[str]:
    base = report.base_model
    shown = f"[{base.id}]({HUB}/{base.id})" if base.on_hub else f"`{base.id}`"
    revision = f" (revision `{base.revision}`)" if base.revision else ""
    yield f"# {name}"
    first, *others = [treated.lead for treated in report.used]
    yield " ".join(
        [f"This is {shown}{revision}, converted so that {first}.", *(f"Besides, {lead}." for lead in others)]
    )
    yield _summary(report)
    yield "## How to load it"
    yield from _loading(report)
    for number, treated in enumerate(report.used):
        yield f"## {treated.heading}"
        if drawn and number == 0:
            yield f"![{treated.caption}]({drawn})"
        yield "\n".join(treated.table)
    yield "## What it saves"
    yield "\n".join(savings_table(report))
    for treated in report.used:
        yield from treated.remarks
    yield "## What it costs"
    yield from _costs(report)
    yield "## Recipe"
    yield f"```yaml\n{recipe.strip()}\n```"
    yield "## Versions and limits"
    versions = ", ".join(f"{package} {number}" for package, number in sorted(report.versions.items()))
    yield f"Made with {versions}." if versions else "The versions of the software were not recorded."
    yield from _limits(report, remark)


def _loading(report: Report) -> Iterator[str]:
    reader = "processor" if report.auto_class == "AutoModelForImageTextToText" else "tokenizer"
    auto_reader = f"Auto{reader.capitalize()}"
    plain = without_code(report.stock)
    trust = "" if plain else ", trust_remote_code=True"
    yield (
        f"```python\nfrom transformers import {report.auto_class}, {auto_reader}\n\n"
        f'model = {report.auto_class}.from_pretrained("{PLACEHOLDER}"{trust})\n'
        f'{reader} = {auto_reader}.from_pretrained("{PLACEHOLDER}"{trust})\n```'
    )
    family = FAMILIES.get(plain.model_type if plain else report.family)
    oldest = "5" if family and family.transformers_5 and not plain else "4.57"
    if plain is None:
        yield (
            "The code of the model lies beside its weights (the `.py` files, which import torch and transformers "
            "only), so transformers asks to trust it; if sa_convert is installed, `import sa_convert` does instead. It "
            f"runs with transformers {oldest} and later, in releases that know models of type `{report.family}`."
        )
    if report.stock is None:
        return
    options = f" {report.stock.options}" if report.stock.options else ""
    yield f"```console\nvllm serve {PLACEHOLDER}{options}\n```"
    if plain is None:
        yield (
            f"vLLM runs it by its own class `{report.stock.architecture}`, which `block_configs` in config.json tell "
            "which layers have no attention, and how many query heads a KV group has in the others. Its pages are as "
            "large. Of the code, vLLM runs the configuration class alone."
        )
        return
    yield (
        f"The model carries no code. It is a `{report.stock.architecture}` of transformers {oldest} and later, told by "
        "`layer_types` and `sliding_window` in config.json which layers attend within a window, and how long that is. "
        "vLLM, too, frees what no window sees any more."
    )


def _summary(report: Report) -> str:
    """One line: what is saved, and what it costs."""
    savings = report.savings
    saved = f"{'keys in the cache' if report.caches else 'keys'} {-savings.key_cache_removed:+.1%}"
    if savings.cache_over and report.cache is not None:
        saved = f"cache at {report.cache.at:,} tokens {-report.cache.removed:+.1%}"
    changes = [saved, f"parameters {0 - savings.parameters.removed:+.1%}"]
    if report.perplexity is None:
        return f"**{', '.join(changes)}; quality not measured**"
    changes.append(f"perplexity{TASK_NAMES[report.perplexity.task]} {report.perplexity.increase:+.2%}")
    if report.long is not None:
        changes.append(f"{report.long.texts.increase:+.2%} in texts of {report.long.before.length:,} tokens")
    if report.copying is not None:
        changes.append(f"copying from the context {_nats(report.copying.increase)} nats per token")
    return f"**{', '.join(changes)}**"


def _nats(change: float) -> str:
    """With its sign, and none of a change that rounds to zero."""
    return f"{round(change, 2) + 0.0:+.2f}"


def _costs(report: Report) -> Iterator[str]:
    if report.perplexity is None:
        yield "**Not measured:** this model was converted without validation, so nothing is known of its quality."
        return
    perplexity, check = report.perplexity, report.decode_check
    yield (
        f"Perplexity{TASK_NAMES[perplexity.task]} on {perplexity.tokens:,} tokens that did not take part in "
        f"calibration ({perplexity.text}; computed in {perplexity.dtype}): "
        f"{perplexity.before:.3f} before, **{perplexity.after:.3f}** after ({perplexity.increase:+.2%})."
    )
    if report.gate is not None:
        verdict = "stays within" if report.gate.passed else "exceeds"
        yield f"It {verdict} the limit that was set, {limits_text(report.gate)}."
    if (agreement := report.agreement) is not None:
        yield (
            f"KL divergence from the base model: {agreement.kl:.4f} nats per token; the same most likely token at "
            f"{agreement.top1:.1%} of {agreement.tokens:,} positions."
        )
    if (copying := report.copying) is not None:
        yield (
            f"Copying from the context ({copying.period} random tokens repeated; {copying.tokens:,} repeated tokens): "
            f"loss {copying.before:.2f} nats per token before, **{copying.after:.2f}** after "
            f"({_nats(copying.increase)})."
        )
    if table := quality_table(report):
        yield "\n".join(table)
        yield (
            "Copying and needles: loss in nats per token, on random tokens that stand so far back in the same text, "
            "and on random code words that were planted there and are asked for at its end. Errors are one standard "
            "error of the paired difference."
        )
    if report.refit is not None and report.refit.share:
        yield f"Output projections were refitted by ridge regression: {refit_summary(report.refit)}."
    if report.heal is not None and report.heal.kept is not None:
        yield f"Healed by distillation from the base model ({report.heal.seconds:.0f} s): {heal_summary(report.heal)}."
        yield f"![Loss on held-out text and copying by tokens trained on]({HEAL_FIGURE})"
    if check is None:
        return
    tokens = "the same" if check.same_greedy_tokens else "other"
    yield (
        f"Decoding with a cache against one pass without: logits differ by at most "
        f"{check.max_abs_logit_difference:.2g} (tolerance {check.tolerance:.2g}), and greedy decoding "
        f"gives {tokens} tokens."
    )


def _limits(report: Report, remark: str | None) -> Iterator[str]:
    if report.perplexity is not None:
        yield (
            "Perplexity was measured on that one text only. It says little of other domains and languages, and of "
            "skills beyond the few that were measured: evaluate the model on your own task."
        )
    if code := report.base_model.code:
        yield (
            f"The base model brings code of its own ({', '.join(f'`{name}`' for name in code)}). This one runs as "
            f"transformers' own class for `{report.family}` does, and was compared with that."
        )
    if report.stock is not None and report.stock.has_code:
        yield "Validated in transformers. Other runtimes with model code of their own were not tried."
    elif report.stock is not None:
        yield (
            "Validated in transformers. Other runtimes, such as llama.cpp, may not honour windows of single layers: "
            "their answers would then differ beyond the first window, without a word."
        )
    elif report.family in IN_VLLM:
        yield (
            "With the plugin sa-convert-vllm, vLLM runs it and saves the cache of windows and of layers that borrow "
            "as a whole. Without it, vLLM saves parameters alone and refuses windows. Other runtimes with model "
            "code of their own, such as llama.cpp, do not know this type of model."
        )
    else:
        yield (
            "Runtimes with model code of their own, such as llama.cpp and vLLM, do not know this type of model and "
            "were not tried."
        )
    yield "Limits, biases and intended use of the base model apply to this one."
    if remark is not None:
        yield remark
