"""The model card: README.md of the output folder. It states what was measured, and nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.data.report import TASK_NAMES, PerplexityReport, Report
from sa_convert.publish import figure
from sa_convert.publish.card_tables import savings_table, sharing_table, uncached
from sa_convert.publish.report import refit_summary, sharing_summary
from sa_convert.units import format_percent

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

FILE = "README.md"
PAPER = "https://arxiv.org/abs/2407.12866"
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForPreTraining": "fill-mask",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForTextEncoding": "feature-extraction",
    "AutoModel": "feature-extraction",
}
"""The Hub's name of what a model does, by the auto class that loads it."""

INHERITED = ("license", "license_name", "license_link", "language")

METADATA = re.compile(r"\s*---\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
"""The YAML at the head of a card, as the Hub tells it from the text."""


def write_card(report: Report, recipe_yaml: str, folder: Path, base_card: Path | None = None) -> Path:
    """Write the model card into a folder.

    recipe_yaml: the resolved recipe. base_card: README.md of the base model, whose licence and language are inherited,
    or None. A figure is shown if it lies in the folder.
    """
    name = f"{report.base_model.id.rpartition('/')[2].removesuffix('.gguf')} with shared attention"
    inherited, remark = _inherited(base_card)
    data = _metadata(report, name, inherited)
    body = "\n\n".join(_sections(report, name, recipe_yaml, remark, (folder / figure.FILE).is_file()))
    path = folder / FILE
    # As huggingface_hub.ModelCard writes it, which takes as long to load as a gigabyte to copy.
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8", newline="\n")
    return path


def _inherited(base_card: Path | None) -> tuple[dict[str, Any], str | None]:
    """Licence and language of the base model, and what to say where its card does not tell them."""
    import yaml

    missing = "The licence of the base model applies; see its own page."
    if base_card is None:
        return {}, missing
    try:
        block = METADATA.match(base_card.read_text(encoding="utf-8-sig"))
        metadata = (yaml.safe_load(block[1]) if block else None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("the metadata of a card are keys and values")
    except (ValueError, OSError, yaml.YAMLError):
        return {}, f"The metadata of the base model's card cannot be read. {missing}"
    return {key: metadata[key] for key in INHERITED if key in metadata}, None if "license" in metadata else missing


def _metadata(report: Report, name: str, inherited: dict[str, Any]) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    results, pipeline = None, PIPELINES.get(report.auto_class)
    if report.perplexity is not None:
        kind, dataset = _dataset(report.perplexity)
        value = round(report.perplexity.after, 4)
        name_of_metric = f"Perplexity{TASK_NAMES[report.perplexity.task]}"
        results = [
            EvalResult(
                pipeline or "other", kind, dataset, "perplexity", value, metric_name=name_of_metric, verified=False
            )
        ]
    return ModelCardData(
        model_name=name if results else None,
        base_model=report.base_model.id if report.base_model.on_hub else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["shared-attention", "sa-convert", report.family, "custom_code"],
        eval_results=results,
        **inherited,
    )


def _dataset(perplexity: PerplexityReport) -> tuple[str, str]:
    """Identifier and name of the text, as model-index wants them."""
    if perplexity.text.startswith("hub:"):
        return re.split("[:,]", perplexity.text)[1], perplexity.text
    return "text", perplexity.text


def _sections(report: Report, name: str, recipe: str, remark: str | None, drawn: bool) -> Iterator[str]:
    base = report.base_model
    shown = f"[{base.id}](https://huggingface.co/{base.id})" if base.on_hub else f"`{base.id}`"
    revision = f" (revision `{base.revision}`)" if base.revision else ""
    yield f"# {name}"
    yield (
        f"This is {shown}{revision}, converted so that some attention heads reuse the attention weights of heads in "
        f"earlier layers ([Shared Attention]({PAPER})). {sharing_summary(report)}; they have no key projections"
        f"{' and cache no keys' if report.caches else ''}."
    )
    yield "## How to load it"
    reader = "processor" if report.auto_class == "AutoModelForImageTextToText" else "tokenizer"
    auto_reader = f"Auto{reader.capitalize()}"
    yield (
        f"```python\nfrom transformers import {report.auto_class}, {auto_reader}\n\n"
        f'model = {report.auto_class}.from_pretrained("PATH_OR_REPO_ID", trust_remote_code=True)\n'
        f'{reader} = {auto_reader}.from_pretrained("PATH_OR_REPO_ID", trust_remote_code=True)\n```'
    )
    yield "The code in this repository imports torch and transformers only."
    yield "## What is shared"
    if drawn:
        yield f"![Which key/value groups reuse attention, and of which layer]({figure.FILE.as_posix()})"
    yield "\n".join(sharing_table(report))
    yield "## What it saves"
    yield "\n".join(savings_table(report))
    yield from uncached(report)
    yield "## What it costs"
    yield from _costs(report)
    yield "## Recipe"
    yield f"```yaml\n{recipe.strip()}\n```"
    yield "## Versions and limits"
    versions = ", ".join(f"{package} {number}" for package, number in sorted(report.versions.items()))
    yield f"Made with {versions}." if versions else "The versions of the software were not recorded."
    yield from _limits(report, remark)


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
        yield f"It {verdict} the limit that was set, {format_percent(report.gate.max_perplexity_increase)}."
    if (copying := report.copying) is not None:
        yield (
            f"Copying from the context ({copying.period} random tokens repeated; {copying.tokens:,} repeated tokens): "
            f"loss {copying.before:.2f} nats per token before, **{copying.after:.2f}** after ({copying.increase:+.2f})."
        )
    if report.refit is not None and report.refit.share:
        yield f"Output projections were refitted by ridge regression: {refit_summary(report.refit)}."
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
    yield "Limits, biases and intended use of the base model apply to this one."
    if remark is not None:
        yield remark
