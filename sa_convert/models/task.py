"""How a model is asked to predict text: each token from those before it, masked tokens from those around them, or, in
`sa_convert.models.denoising`, spans by a decoder from what an encoder has read.

A task says which tokens of a sequence are scored, and makes of sequences and scored tokens what the model is called
with. What is scored depends on the sequence and the seed alone, so that all models are asked the same.

Letters in shape comments: B sequences, L tokens of a sequence, P places of the logits, N predictions that are scored.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from sa_convert.domain.report import PredictionTask
from sa_convert.errors import DataError
from sa_convert.models.auto_class import prediction_task
from sa_convert.models.device import input_device

if TYPE_CHECKING:
    import torch

Frame = tuple[tuple[int, ...], tuple[int, ...]]
"""What a tokenizer puts before and after a text."""

MASKED_PART = 0.15
"""The part of a sequence's tokens that is masked, or cut out in spans."""


@dataclass(frozen=True)
class Inputs:
    """A batch. kwargs: what the model is called with, tensors on its device, no cache. labels: (B, P) int64 and scored:
    (B, P) bool, both on the CPU: what the logits at each place predict, and whether that counts."""

    kwargs: Mapping[str, Any]
    labels: "torch.Tensor"
    scored: "torch.Tensor"

    def logits(self, model: Any) -> "torch.Tensor":
        """(B, P, vocabulary), in the model's dtype and on its device."""
        output = model(**self.kwargs)
        # Models with several pretraining heads name that of the masked tokens.
        found: torch.Tensor = output.prediction_logits if hasattr(output, "prediction_logits") else output.logits
        return found

    def rows(self, logits: "torch.Tensor") -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """For each sequence the scored logits (N, vocabulary) and their labels (N), both where the logits are."""
        for row, labels, scored in zip(logits, self.labels, self.scored, strict=True):
            yield row[scored.to(row.device)], labels[scored].to(row.device)


@dataclass(frozen=True)
class Decoding:
    """What cached decoding is checked on. tokens: (T,), of the decoder; source: (S,), of the encoder, or None."""

    tokens: "torch.Tensor"
    source: "torch.Tensor | None" = None


class Task(ABC):
    """name: as in reports. frame: what every sequence starts and ends with, or None: with the token that starts a text,
    where the tokenizer has one. copies: whether it can show how a model copies random tokens from the context."""

    name: PredictionTask
    frame: Frame | None
    copies: bool = False

    @property
    def inserted(self) -> tuple[int, ...]:
        """Tokens that `batch` puts in."""
        return ()

    @abstractmethod
    def scored(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """Which of the tokens (B, L) are predicted and count: (B, L) bool. Raises DataError for too few tokens."""

    @abstractmethod
    def batch(self, model: Any, tokens: "torch.Tensor", scored: "torch.Tensor | None" = None) -> Inputs:
        """What `model` is called with to predict the scored ones (B, L; None: as `scored` says) of tokens (B, L)."""

    def decoding(self, model: Any, sequence: "torch.Tensor") -> Decoding | None:
        """What to decode of a sequence (L) with a cache, or None where the model has none."""
        return None

    def count(self, scored: "torch.Tensor") -> int:
        """How many predictions count."""
        return int(scored.sum())


class NextToken(Task):
    """Each token from those before it. `scored` may hold the first token, which nothing predicts."""

    name = "next-token"
    frame = None
    copies = True

    def scored(self, tokens: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.ones(tokens.shape, dtype=torch.bool)

    def batch(self, model: Any, tokens: "torch.Tensor", scored: "torch.Tensor | None" = None) -> Inputs:
        scored = (self.scored(tokens) if scored is None else scored).roll(-1, dims=1)
        scored[:, -1] = False
        kwargs = {"input_ids": tokens.to(input_device(model)), "use_cache": False}
        return Inputs(kwargs, tokens.roll(-1, dims=1), scored)

    def decoding(self, model: Any, sequence: "torch.Tensor") -> Decoding:
        return Decoding(sequence)

    def count(self, scored: "torch.Tensor") -> int:
        return int(scored[..., 1:].sum())


NEXT_TOKEN = NextToken()


@dataclass(frozen=True)
class MaskedToken(Task):
    """Tokens that are replaced by `mask`, from those around them. special: tokens that are never masked."""

    frame: Frame
    mask: int
    special: frozenset[int]
    seed: int = 0
    name = "masked-token"

    @property
    def inserted(self) -> tuple[int, ...]:
        return (self.mask,)

    def scored(self, tokens: "torch.Tensor") -> "torch.Tensor":
        import torch

        special = torch.tensor(sorted(self.special), dtype=torch.long)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, chosen in zip(tokens, scored, strict=True):
            ordinary = (~torch.isin(row, special)).nonzero()[:, 0]
            if len(ordinary) < 2:
                raise too_short(len(row))
            order = torch.randperm(len(ordinary), generator=generator_of(row, self.seed))
            chosen[ordinary[order[: max(1, round(MASKED_PART * len(ordinary)))]]] = True
        return scored

    def batch(self, model: Any, tokens: "torch.Tensor", scored: "torch.Tensor | None" = None) -> Inputs:
        scored = self.scored(tokens) if scored is None else scored
        return Inputs({"input_ids": tokens.masked_fill(scored, self.mask).to(input_device(model))}, tokens, scored)


def task_of(config: Mapping[str, Any], tokenizer: Any, who: str, seed: int = 0) -> Task:
    """The task for a model with this config.json. who: what messages call it. seed: of masks and spans.

    Raises DataError where it has no language-modelling head, or its tokenizer no mask token that it needs.
    """
    name = prediction_task(config, who)
    if name == "next-token":
        return NEXT_TOKEN
    if name == "teacher-forced":
        from sa_convert.models.denoising import spans_task

        return spans_task(tokenizer, frame_of(tokenizer), seed)
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"{who}: the tokenizer has no mask token, so masked tokens cannot be predicted: name it as 'mask_token' in "
            "tokenizer_config.json."
        )
    return MaskedToken(frame_of(tokenizer), tokenizer.mask_token_id, frozenset(tokenizer.all_special_ids), seed)


def frame_of(tokenizer: Any) -> Frame:
    """What the tokenizer puts around a text, such as [CLS] and [SEP]."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    marked = list(tokenizer("a")["input_ids"])
    for at in range(len(marked) - len(plain) + 1):
        if marked[at : at + len(plain)] == plain:
            return tuple(marked[:at]), tuple(marked[at + len(plain) :])
    return (), ()


def generator_of(row: "torch.Tensor", seed: int) -> "torch.Generator":
    """Random numbers that depend on the tokens (L) of a sequence and the seed alone, not on its place among others."""
    import torch

    return torch.Generator().manual_seed(crc32(row.numpy().tobytes()) ^ (seed & 0xFFFFFFFF))


def too_short(length: int) -> DataError:
    return DataError(f"Sequences of {length} tokens are too short to mask any of them: give longer ones.")
