"""Small masked and sequence-to-sequence models with tokenizers, as files, and opened with their task."""

from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sa_convert.models.task import task_of
from sa_convert.models.tokens import token_sequences
from sa_convert.read.folder import read_config
from sa_convert.texts.text import load_text
from support.validation_models import tokenizer as byte_tokenizer

SIZES = {
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 96, "pad_token_id": 0},
    "roberta": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                "max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 1.0,
           "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.5,
             "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
             "decoder_start_token_id": 3},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 2, "eos_token_id": 3},
}  # fmt: skip
CLASSES = {
    "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM", "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration", "llama": "LlamaForCausalLM",
}  # fmt: skip


def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """T5's ends texts with </s> and has sentinels; the others put tokens around a text, and have a mask token."""
    from tokenizers.processors import TemplateProcessing

    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    around = "$A </s>" if kind == "t5" else "<s> $A </s>"
    if kind == "t5":
        extra = [f"<extra_id_{number}>" for number in range(20)]
    else:
        extra, names = ["<mask>"], {**names, "bos_token": "<s>", "cls_token": "<s>", "mask_token": "<mask>"}
    trained = byte_tokenizer().backend_tokenizer
    trained.add_special_tokens(["<pad>", "<unk>", *extra])
    pairs = [(name, trained.token_to_id(name)) for name in ("<s>", "</s>")]
    trained.post_processor = TemplateProcessing(single=around, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=trained, **names)


def save(folder: Path, kind: str, architecture: str | None = None, **changes) -> Path:
    words = small_tokenizer(kind)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(words), **{**SIZES[kind], **changes})
    model = getattr(transformers, architecture or CLASSES[kind])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def opened(folder: Path):
    """The model, its tokenizer, its task, and tokens of a text."""
    config = read_config(folder)
    words = AutoTokenizer.from_pretrained(folder)
    task = task_of(config, words, folder.name)
    text = load_text("builtin").split("validation", ("prose",))
    tokens = token_sequences(words, text, 3, 60, task.frame)
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    return model, words, task, tokens
