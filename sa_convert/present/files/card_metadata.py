"""The metadata of the model card, as the Hub understands them: what a model is, and what was measured of it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.report import TASK_NAMES, PerplexityReport, Report
from sa_convert.domain.stock import without_code

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

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

RELATION = "finetune"
"""Of the four that the Hub knows (adapter, merge, quantized, finetune), the one for a model with other weights."""

INHERITED = ("license", "license_name", "license_link", "language")

BLOCK = re.compile(r"\s*---\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
"""The YAML at the head of a card, as the Hub tells it from the text."""

_MISSING = "The licence of the base model applies; see its own page."


def inherited(base_card: Path | None, base_url: str | None, folder: Path) -> tuple[dict[str, Any], str | None]:
    """Licence and language of the base model, and what to say if its card does not tell them.

    base_url: the base model's page on the Hub. A link to a licence file that is not in `folder` becomes one to there.
    """
    import yaml

    if base_card is None:
        return {}, _MISSING
    try:
        block = BLOCK.match(base_card.read_text(encoding="utf-8-sig"))
        # Every value is text, as for the Hub: the language `no` is Norwegian, not false.
        told = (yaml.load(block[1], yaml.BaseLoader) if block else None) or {}
        if not isinstance(told, dict):
            raise ValueError("the metadata of a card are keys and values")
    except (ValueError, RecursionError, OSError, yaml.YAMLError):
        return {}, f"The metadata of the base model's card cannot be read. {_MISSING}"
    metadata = {key: told[key] for key in INHERITED if _is_text(told.get(key))}
    link = metadata.get("license_link")
    if isinstance(link, str) and "://" not in link and not (folder / link).is_file():
        if base_url is not None:
            metadata["license_link"] = f"{base_url}/blob/main/{link}"
        else:
            del metadata["license_link"]
    return metadata, None if "license" in metadata else _MISSING


def _is_text(value: Any) -> bool:
    """Text, or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(text, str) and text not in ("", "~", "null") for text in values)


def metadata(report: Report, name: str, base: Mapping[str, Any]) -> "ModelCardData":
    """name: of the model, for the results. base: what is inherited."""
    from huggingface_hub import ModelCardData

    pipeline = PIPELINES.get(report.auto_class)
    results = _results(report.perplexity, pipeline or "other") if report.perplexity is not None else None
    relation: dict[str, Any] = {"base_model_relation": RELATION} if report.base_model.on_hub else {}
    return ModelCardData(
        model_name=name if results else None,
        base_model=report.base_model.id if report.base_model.on_hub else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["shared-attention", "sa-convert", report.family, *_runs(report)],
        eval_results=results,
        **relation,
        **base,
    )


def _runs(report: Report) -> Iterator[str]:
    """What it runs in."""
    if report.stock is not None:
        yield report.stock.engine
    if without_code(report.stock) is None:
        yield "custom_code"


def _results(perplexity: PerplexityReport, task: str) -> "list[EvalResult]":
    """What was measured, of this model and of its base, on the same tokens."""
    from huggingface_hub import EvalResult

    name = f"Perplexity{TASK_NAMES[perplexity.task]}"
    measured = ((name, perplexity.after), (f"{name} of the base model", perplexity.before))
    return [
        EvalResult(
            task_type=task,
            **_dataset(perplexity.text),
            metric_type="perplexity",
            metric_value=round(value, 4),
            metric_name=label,
            metric_args={"tokens": perplexity.tokens, "dtype": perplexity.dtype},
            verified=False,
        )
        for label, value in measured
    ]


def _dataset(text: str) -> dict[str, Any]:
    """The text, as model-index wants data sets: identifier, name, and of one on the Hub configuration and split."""
    source = text.partition(",")[0]
    if not source.startswith("hub:"):
        return {"dataset_type": "text", "dataset_name": text}
    identifier, config, split = (*source.removeprefix("hub:").split(":"), "", "")[:3]
    return {
        "dataset_type": identifier,
        "dataset_name": text,
        "dataset_config": config or None,
        "dataset_split": split or "train",
    }
