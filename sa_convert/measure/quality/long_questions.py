"""All questions about long context that both models are asked: text by position, copying by distance, needles."""

from dataclasses import dataclass
from typing import Any

import torch

from sa_convert.domain.evaluation import CopyingLoss
from sa_convert.domain.long_context import LongContext
from sa_convert.domain.losses import Losses
from sa_convert.measure.quality.copying import Probes
from sa_convert.measure.quality.long_text import by_position, token_losses
from sa_convert.measure.quality.needle import needles
from sa_convert.models.load import embedded_tokens
from sa_convert.models.tokens import start_tokens

LENGTH = 2048
"""Tokens of a long text, unless the user says otherwise. A forward pass over them fits where the model does."""

SEQUENCES = 4


@dataclass(frozen=True)
class LongQuestions:
    """texts: (N, L), of the validation text. seed: of probes and needles."""

    tokenizer: Any
    texts: torch.Tensor
    seed: int = 0

    @property
    def length(self) -> int:
        return self.texts.shape[1]

    def ask(self, model: Any, who: str = "") -> LongContext:
        """who: what the progress bar calls the model, such as " of the base model"."""
        losses = token_losses(model, self.texts, f"long text{who}")
        start = start_tokens(self.tokenizer)
        probes = Probes.of(self.tokenizer, embedded_tokens(model), self.length, self.seed)
        planted = needles(self.tokenizer, self.texts, probes.vocabulary, self.seed, start)
        return LongContext(
            length=self.length,
            texts=Losses(tuple(losses.mean(dim=1).tolist())),
            positions=by_position(losses),
            needle=planted.losses(model, f"needle{who}") if planted else (),
        )

    def copying(self, model: Any, known: tuple[CopyingLoss, ...] = ()) -> tuple[CopyingLoss, ...]:
        """At all distances up to half of the length. known: what was measured already; it comes with the others."""
        probes = Probes.of(self.tokenizer, embedded_tokens(model), self.length, self.seed)
        measured = {copying.distance: copying for copying in known}
        for distance in probes.long_distances:
            if distance not in measured:
                measured[distance] = probes.loss_at(model, distance)
        return tuple(measured[distance] for distance in sorted(measured))
