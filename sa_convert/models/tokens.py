"""Documents to sequences of tokens of equal length."""

from collections.abc import Iterable
from typing import Any

import torch

from sa_convert.errors import DataError
from sa_convert.models.task import Frame
from sa_convert.texts.text import Text


def token_sequences(
    tokenizer: Any, text: Text, sequences: int, length: int, frame: Frame | None = None
) -> torch.Tensor:
    """Tokens (sequences, length), int64: the documents one after another, cut into equal sequences.

    frame: what each sequence starts and ends with (`Task.frame`); None: it starts with the token that the tokenizer
    puts before a text, if it does. Only as much text is read as is needed. Raises DataError if the text is too
    short, or the length leaves no room for text.
    """
    start, end = frame or (start_tokens(tokenizer), ())
    if length <= len(start) + len(end):
        raise DataError(f"Sequences of {length} tokens have no room for text: give longer ones.")
    needed = sequences * (length - len(start) - len(end))
    tokens = _tokens(tokenizer, text, needed)
    if not tokens:
        raise DataError(f"Text {text.name}: empty, or the tokenizer makes no token of it.")
    if len(tokens) < needed:
        raise DataError(
            f"Text {text.name}: {len(tokens)} tokens are too few for {sequences} sequences of {length} tokens, "
            f"which need {needed}: give a longer text."
        )
    rows = torch.tensor(tokens[:needed], dtype=torch.long).view(sequences, -1)
    around = (torch.tensor(part, dtype=torch.long).expand(sequences, -1) for part in (start, end))
    return torch.cat([next(around), rows, next(around)], dim=1)


def long_sequences(tokenizer: Any, text: Text, sequences: int, length: int) -> torch.Tensor | None:
    """As `token_sequences`, but at most so many: as many as the text fills. None if it does not fill one."""
    start = start_tokens(tokenizer)
    room = length - len(start)
    if room < 1:
        return None
    tokens = _tokens(tokenizer, text, sequences * room)
    filled = min(sequences, len(tokens) // room)
    if not filled:
        return None
    rows = torch.tensor(tokens[: filled * room], dtype=torch.long).view(filled, room)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(filled, -1), rows], dim=1)


def _tokens(tokenizer: Any, text: Text, needed: int) -> list[int]:
    """Those of the documents one after another; no more documents are read than are needed."""
    tokens: list[int] = []
    for document in text.documents:
        tokens += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= needed:
            break
    return tokens


def start_tokens(tokenizer: Any) -> list[int]:
    """[bos] if the tokenizer itself starts a text with it, else []."""
    plain: Iterable[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked: list[int] = tokenizer("a")["input_ids"]
    starts = tokenizer.bos_token_id is not None and marked[:1] == [tokenizer.bos_token_id] != list(plain)[:1]
    return marked[:1] if starts else []


def ordinary_tokens(tokenizer: Any, embeddings: int) -> list[int]:
    """Sorted ids of the tokens that stand for text: no special and no added ones, none beyond the model's embeddings.

    Raises DataError if fewer than two are left, of which nothing can be copied.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = sorted({token for token in tokenizer.get_vocab().values() if token < embeddings} - special)
    if len(tokens) < 2:
        raise DataError(f"The tokenizer has {len(tokens)} ordinary tokens: too few to make copying probes of.")
    return tokens
