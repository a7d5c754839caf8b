"""How a model is asked to predict text: each token from those before it, masked tokens from those around them, or, in
`sa_convert.models.denoising`, spans by a decoder from what an encoder has read.

Letters in shape comments: B sequences, L tokens of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sa_convert.errors import DataError
from sa_convert.models.auto_class import prediction_task
from sa_convert.models.base_task import MASKED_PART, Decoding, Frame, Inputs, Task, generator_of, too_short
from sa_convert.models.denoising import spans_task
from sa_convert.models.device import input_device


class NextToken(Task):
    """Each token from those before it. `scored` may hold the first token, which nothing predicts."""

    name = "next-token"
    frame = None
    copies = True

    def scored(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.ones(tokens.shape, dtype=torch.bool)

    def batch(self, model: Any, tokens: torch.Tensor, scored: torch.Tensor | None = None) -> Inputs:
        scored = (self.scored(tokens) if scored is None else scored).roll(-1, dims=1)
        scored[:, -1] = False
        kwargs = {"input_ids": tokens.to(input_device(model)), "use_cache": False}
        return Inputs(kwargs, tokens.roll(-1, dims=1), scored)

    def decoding(self, model: Any, sequence: torch.Tensor) -> Decoding:
        return Decoding(sequence)

    def count(self, scored: torch.Tensor) -> int:
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

    def scored(self, tokens: torch.Tensor) -> torch.Tensor:
        special = torch.tensor(sorted(self.special), dtype=torch.long)
        scored = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, chosen in zip(tokens, scored, strict=True):
            ordinary = (~torch.isin(row, special)).nonzero()[:, 0]
            if len(ordinary) < 2:
                raise too_short(len(row))
            order = torch.randperm(len(ordinary), generator=generator_of(row, self.seed))
            chosen[ordinary[order[: max(1, round(MASKED_PART * len(ordinary)))]]] = True
        return scored

    def batch(self, model: Any, tokens: torch.Tensor, scored: torch.Tensor | None = None) -> Inputs:
        scored = self.scored(tokens) if scored is None else scored
        return Inputs({"input_ids": tokens.masked_fill(scored, self.mask).to(input_device(model))}, tokens, scored)


def task_of(config: Mapping[str, Any], tokenizer: Any, who: str, seed: int = 0) -> Task:
    """The task for a model with this config.json. who: what messages call it. seed: of masks and spans.

    Raises DataError if it has no language-modelling head, or its tokenizer no mask token that it needs.
    """
    name = prediction_task(config, who)
    if name == "next-token":
        return NEXT_TOKEN
    if name == "teacher-forced":
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
