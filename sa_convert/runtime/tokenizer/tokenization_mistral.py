"""Tokenizers of converted Mistral models: what AutoTokenizer makes for the base by its model type, which ours is not.

tokenizer_config.json names a class of this file only where that matters. Without `trust_remote_code` the folder's
tokenizer.json is read as it stands.
"""

from importlib.util import find_spec

import transformers
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

LARGE = 100_000
"""Tokens; transformers holds the pattern of smaller vocabularies right."""

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Mistral splits text; many of its checkpoints for transformers hold another pattern."""

logger = logging.get_logger(__name__)


class CorrectableTokenizer(PreTrainedTokenizerFast):
    """tokenizer.json, its pattern corrected if `fix_mistral_regex` asks for that, as an option or in
    tokenizer_config.json."""

    @classmethod
    def from_pretrained(cls, name, *inputs, **options):
        options.pop("trust_remote_code", None)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name, *inputs, **options)
        backend = tokenizer.backend_tokenizer
        if backend.get_vocab_size() > LARGE and backend.pre_tokenizer is not None:
            wanted = options.get("fix_mistral_regex", tokenizer.init_kwargs.get("fix_mistral_regex"))
            if wanted:
                correct(backend)
            elif wanted is None:
                logger.warning(f"{name}: the tokenizer may split text wrongly; fix_mistral_regex=True corrects it.")
        return tokenizer


class TekkenTokenizer(PreTrainedTokenizerFast):
    """tekken.json if mistral-common is installed and no correction is asked for, else tokenizer.json."""

    otherwise = PreTrainedTokenizerFast

    @classmethod
    def from_pretrained(cls, name, *inputs, **options):
        by_mistral = getattr(transformers, "MistralCommonBackend", None)  # transformers 4 goes by the named class
        if by_mistral is None or find_spec("mistral_common") is None or "fix_mistral_regex" in options:
            by_mistral = cls.otherwise
        options.pop("trust_remote_code", None)
        return by_mistral.from_pretrained(name, *inputs, **options)


class CorrectableTekkenTokenizer(TekkenTokenizer):
    """The same for a tokenizer.json that can be corrected."""

    otherwise = CorrectableTokenizer


def correct(backend):
    """Split by PATTERN, as transformers does where it corrects the tokenizer of a base model."""
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    present = backend.pre_tokenizer
    if isinstance(present, pre_tokenizers.Sequence):
        present[0] = split
        return
    if isinstance(present, pre_tokenizers.Metaspace):
        present = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, present])
