"""Which auto class of transformers loads a model, and how such a model is asked to predict text."""

from collections.abc import Mapping
from typing import Any

from sa_convert.domain.report import PredictionTask
from sa_convert.errors import DataError
from sa_convert.families.family import CLASS_PREFIX, PREFIX
from sa_convert.families.model_classes import HEADS, auto_class_of, ending_of
from sa_convert.families.table import family_named
from sa_convert.read.family_of import unwrapped

CAUSAL = "AutoModelForCausalLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
MULTIMODAL = "AutoModelForImageTextToText"

TASKS: Mapping[str, PredictionTask] = {
    CAUSAL: "next-token",
    MULTIMODAL: "next-token",
    "AutoModelForMaskedLM": "masked-token",
    "AutoModelForPreTraining": "masked-token",
    SEQ2SEQ: "teacher-forced",
}
"""Of the auto classes whose models have a language-modelling head."""


def auto_class_name(config: Mapping[str, Any]) -> str:
    """The auto class for a model with this config.json: that of its architecture, though the `auto_map` of a converted
    model names more; of a model with own code, the one that its `auto_map` names. If nothing is said,
    AutoModelForCausalLM."""
    architecture = architecture_of(config)
    family = family_named(config.get("model_type"))
    known = auto_class_of(family, (architecture or "").removeprefix(CLASS_PREFIX)) if family else None
    if known and _shares(config):
        return known
    references = config.get("auto_map")
    if isinstance(references, Mapping):
        named = {key: str(value) for key, value in references.items() if key.startswith("AutoModel")}
        for key, value in named.items():
            if value.rpartition(".")[2] == architecture:
                return key
        if _shares(config) and len(named) == 1:
            return next(iter(named))
    return known or _by_ending(architecture, config)


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The model class that config.json names, or that of the family's models that name none."""
    names = config.get("architectures")
    family = family_named(config.get("model_type"))
    if isinstance(names, list) and names:
        return unwrapped(str(names[0]), family) if family and not _shares(config) else str(names[0])
    return family.default_class if family else None


def prediction_task(config: Mapping[str, Any], who: str) -> PredictionTask:
    """How a model with this config.json predicts text. who: what messages call it.

    Raises DataError if it has no language-modelling head, or one that cannot be measured.
    """
    auto_class, architecture = auto_class_name(config), architecture_of(config)
    if auto_class not in TASKS:
        raise headless(who, architecture or auto_class)
    family = family_named(config.get("model_type"))
    if auto_class == CAUSAL and family and family.modules.bidirectional and not config.get("is_decoder"):
        raise DataError(
            f"{who}: {architecture} sees the tokens that it predicts, since config.json does not set 'is_decoder', so "
            "perplexity means nothing: use --no-validate to convert it."
        )
    return TASKS[auto_class]


def headless(who: str, architecture: str) -> DataError:
    """The error for a model that perplexity cannot be measured of."""
    return DataError(
        f"{who}: {architecture} has no language-modelling head, which perplexity needs: use --no-validate to convert "
        "it, and evaluate it on its own task."
    )


def _by_ending(architecture: str | None, config: Mapping[str, Any]) -> str:
    """By how the class's name ends, for models that no family describes."""
    encoder_decoder = bool(config.get("is_encoder_decoder"))
    ending = ending_of(architecture)
    if ending == "ForConditionalGeneration" and not encoder_decoder and "text_config" in config:
        return MULTIMODAL
    auto_class = HEADS[ending] if ending else CAUSAL
    return SEQ2SEQ if auto_class == CAUSAL and encoder_decoder else auto_class


def _shares(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type")).startswith(PREFIX)
