"""Tiny models for the tests of validation: a base checkpoint with a tokenizer, and one that shares attention.

The converted folder is made in memory by the exported classes, not by the rewriter.
"""

import shutil
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from sa_convert.families.table import FAMILIES
from sa_convert.texts.text import load_text
from sa_convert.treated_classes import config_class_of, model_class_of

VOCABULARY = 300


def tokenizer() -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    texts = [document.text for document in load_text("builtin").documents[:20]]
    trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_config(family: str = "llama", **changes: object) -> transformers.PretrainedConfig:
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **changes,
    }  # fmt: skip
    return transformers.AutoConfig.for_model(family, **options)


def save_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A tiny random model and its tokenizer, as a checkpoint folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_converted(base: Path, folder: Path, source: int = 1, span: tuple[int, ...] = (2, 3)) -> Path:
    """The base with the layers of a span borrowing from all heads of a source layer, as convert writes it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    family = FAMILIES[model.config.model_type]
    options = model.config.to_dict()
    heads = [[source, head] for head in range(model.config.num_attention_heads)]
    options["shared_attention"] = {"layers": {str(layer): heads for layer in span}}
    options.pop("model_type")
    converted = model_class_of(family, family.default_class)(config_class_of(family)(**options)).to(model.dtype)
    kept = converted.state_dict().keys()
    converted.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in kept})
    converted.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return folder
