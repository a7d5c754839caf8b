"""Measures a model that heals, or its teacher, on what is held out."""

from typing import Any

import torch

from sa_convert.domain.healed import Judgement
from sa_convert.heal.distilled import Teacher
from sa_convert.heal.healing_text import HeldOut


class Judge:
    """Asks a `Distilled` model, or what wraps one. Every process has to ask at the same time.

    teacher: its answers to held-out text are kept. device: where models are.
    """

    def __init__(self, held_out: HeldOut, teacher: Teacher, device: torch.device) -> None:
        self._held_out, self._device = held_out, device
        never = torch.tensor([-1])
        self._answers = {
            kind: [teacher(row[None].to(device), never).cpu() for row in rows] for kind, rows in held_out.text.items()
        }

    def judge(self, model: Any, tokens: int, training: float | None = None) -> Judgement:
        """tokens: that the model was trained on. training: mean training loss since the last time."""
        was = model.training
        model.eval()
        try:
            with torch.no_grad():
                text = {kind: self._text(model, kind) for kind in self._held_out.text}
                copying = {distance: self._copying(model, distance) for distance in self._held_out.copying}
        finally:
            model.train(was)
        divergence, losses = ({kind: pair[part] for kind, pair in text.items()} for part in (0, 1))
        return Judgement(tokens, divergence, losses, copying, training)

    def _text(self, model: Any, kind: str) -> tuple[float, float]:
        """Mean divergence and loss."""
        return self._means(model, self._held_out.text[kind], 1, self._answers[kind])

    def _copying(self, model: Any, distance: int) -> float:
        """Mean loss of what is said for the second time."""
        probes = self._held_out.copying[distance]
        return self._means(model, probes, self._held_out.start + distance, [None] * len(probes))[1]

    def _means(self, model: Any, rows: torch.Tensor, begin: int, answers: list[Any]) -> tuple[float, float]:
        """Of the tokens of rows (N, L) from place `begin` on."""
        sums, count = [0.0, 0.0], 0
        scored = torch.zeros(1, rows.shape[1], dtype=torch.bool, device=self._device)
        scored[:, begin:] = True
        for row, answer in zip(rows, answers, strict=True):
            wanted = None if answer is None else answer.to(self._device)
            found = model(tokens=row[None].to(self._device), scored=scored, wanted=wanted)
            sums = [
                total + float(found[name].double().sum())
                for total, name in zip(sums, ("divergences", "losses"), strict=True)
            ]
            count += len(found["losses"])
        return sums[0] / count, sums[1] / count
