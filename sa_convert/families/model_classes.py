"""The auto classes of transformers that load a model type, and the model class that each of them makes of it.

Which there are stands in auto_classes.json, so that rewriting needs no transformers. `python docs/generate.py` writes
that file from the tables of the pinned release; tests/runtime/test_auto_classes.py compares them.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from sa_convert.families.family import Family

FILE = Path(__file__).with_name("auto_classes.json")

HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "MTModel": "AutoModelForSeq2SeqLM",
    "EncoderModel": "AutoModelForTextEncoding",
    "Model": "AutoModel",
}
"""How the names of model classes end, and the auto class that loads them; in multimodal models,
ForConditionalGeneration is loaded by AutoModelForImageTextToText."""

_MULTIMODAL_HEADS = {
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "Model": "AutoModel",
}

MAPPINGS = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "AutoModelForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
    "AutoModelForNextSentencePrediction": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING",
    "AutoModelForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTextEncoding": "MODEL_FOR_TEXT_ENCODING_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}
"""The mapping of each auto class that loads language models, as `transformers` exports it. Its table of class names, by
model type, is called the same and `_NAMES`."""


def ending_of(name: str | None) -> str | None:
    """How the name of a model class ends, of the endings in HEADS the longest: "ForCausalLM" of LlamaForCausalLM."""
    return next((end for end in sorted(HEADS, key=len, reverse=True) if (name or "").endswith(end)), None)


def auto_class_of(family: Family, architecture: str) -> str | None:
    """The auto class of transformers for a model class of this family, or None if it is no class of the family."""
    usual = family.default_class
    # Of the language model inside of a multimodal one, the config's name begins those of all classes but the default.
    other = architecture != usual
    prefix = family.config_class.removesuffix("Config") if other else usual.removesuffix(ending_of(usual) or "")
    if not architecture.startswith(prefix):
        return None
    head = architecture.removeprefix(prefix)
    if family.text:
        return _MULTIMODAL_HEADS.get(head)
    if head == "ForConditionalGeneration" and not family.encoder_decoder:
        return None
    return HEADS.get(head)


def auto_classes_of(family: Family, architecture: str) -> tuple[str, ...]:
    """As `auto_class_of`, with the others that load the same class: a multimodal model also generates from text."""
    found = auto_class_of(family, architecture)
    if found == "AutoModelForImageTextToText":
        return found, "AutoModelForCausalLM"
    return (found,) if found else ()


def model_classes_of(family: Family, architecture: str) -> dict[str, str]:
    """The family's class that each auto class loads, if it has one: {"AutoModel": "LlamaModel"}. First come those that
    load `architecture`, a class of the family."""
    found = dict.fromkeys(auto_classes_of(family, architecture), architecture)
    for auto_class, name in _table().get(family.model_type, {}).items():
        found.setdefault(auto_class, name)
    return found


def classes_in_transformers(family: Family) -> dict[str, str]:
    """What stands in auto_classes.json for a family, by the release of transformers that is installed."""
    from transformers.models.auto import modeling_auto

    tables = {auto_class: getattr(modeling_auto, f"{mapping}_NAMES", {}) for auto_class, mapping in MAPPINGS.items()}
    named = {auto_class: table.get(family.model_type) for auto_class, table in tables.items()}
    return {key: name for key, name in named.items() if isinstance(name, str) and auto_class_of(family, name)}


@cache
def _table() -> Mapping[str, Mapping[str, str]]:
    table: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return table
