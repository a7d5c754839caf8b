"""The student as a module that computes its own loss, and the teacher.

Letters in shape comments: B sequences, L tokens of a sequence, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

CHUNK = 2**24
"""Logits of one model that are in memory at a time: 64 MB in float32."""

BLOCK = 2**20
"""Logits of which divergences are computed at a time on a processor: 4 MB in float32."""

AGREES = 1e-3
"""Largest difference between logits that a model gives and those of its head on its last hidden states, as a part of
the largest; where it is more, logits are compared whole."""


def last_states(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Last hidden states (B, L, H) of tokens (B, L)."""
    states: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return states


def head_of(student: Any, teacher: Any, tokens: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The function that makes logits of last hidden states, in both models; None: they have none in common.

    tokens: (B, L) to try it on, with the teacher as it is and with its states in the student's head.
    """
    with torch.no_grad():
        try:
            wanted = teacher(input_ids=tokens, use_cache=False).logits.float()
            states = last_states(teacher, tokens)
        except (AttributeError, TypeError):
            return None
        head = student.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if weight is None or states.shape[-1] != weight.shape[-1]:
            return None
        plain = head(states.to(weight.dtype)).float()
        cap = getattr(teacher.config.get_text_config(), "final_logit_softcapping", None)
        scale = float((wanted * plain).sum() / plain.square().sum())
        for after in (_Head(head), _Head(head, scale=scale), *([_Head(head, cap=float(cap))] if cap else [])):
            if (after(states.to(weight.dtype)).float() - wanted).abs().max() <= AGREES * wanted.abs().max():
                return after
    return None


class _Head:
    """Logits of last hidden states. Not a module: the head's weights stay where the student has them."""

    def __init__(self, head: Any, scale: float = 1.0, cap: float | None = None) -> None:
        self._head, self._scale, self._cap = head, scale, cap

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(states)
        if self._cap is not None:
            return self._cap * torch.tanh(logits / self._cap)
        return logits if self._scale == 1.0 else logits * self._scale


class HeadDivergence(torch.autograd.Function):
    """sum over N of weights x KL(teacher || student) at temperature 1, from last hidden states (N, H) of both.

    Chunk by chunk, gradients included, so that logits of a whole batch are never in memory: the head is frozen.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor, head: Any) -> torch.Tensor:
        gradient = torch.zeros_like(states)
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        rows = chunk_rows(head, states)
        for start in range(0, len(states), rows):
            at = slice(start, start + rows)
            target = head(wanted[at]).float()
            part = states[at].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            apart, slopes = sloped_divergences(target, logits.detach().float(), weights[at])
            (gradient[at],) = torch.autograd.grad(logits, part, slopes.to(logits.dtype))
            total += (weights[at] * apart).sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return grads[0].to(gradient.dtype) * gradient, None, None, None


def sloped_divergences(
    target: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL in nats (N) of logits of a teacher (N, V) to those of a student (N, V), float32, and the gradient (N, V) of
    the weighted sum with respect to the student's logits: weights x (student's chances - teacher's chances).

    Some rows at a time, so that what is between stays in a processor's cache. What the teacher holds impossible adds
    nothing.
    """
    apart, slopes = torch.empty_like(weights, dtype=torch.float32), torch.empty_like(logits)
    rows = max(1, BLOCK // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        at = slice(start, start + rows)
        given, own = target[at].log_softmax(-1), logits[at].log_softmax(-1)
        parts = given.exp()
        given = given.sub_(own).mul_(parts)
        apart[at] = given.masked_fill_(parts == 0, 0.0).sum(-1)
        torch.sub(own.exp_(), parts, out=slopes[at]).mul_(weights[at, None])
    return apart, slopes


def divergences(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL in nats (N) of log-probabilities (N, V) to logits (N, V), float32. What the target holds impossible adds
    nothing."""
    own = logits.log_softmax(-1)
    parts = target.exp()
    return torch.where(parts > 0, parts * (target - own), 0.0).sum(-1)


def chunk_rows(head: Any, states: torch.Tensor) -> int:
    """Positions whose logits are computed at a time."""
    weight = getattr(getattr(head, "_head", head), "weight", None)
    vocabulary = weight.shape[0] if weight is not None else states.shape[-1]
    return max(1, CHUNK // int(vocabulary))


class Distilled(nn.Module):
    """Around a student, so that whatever wraps a module (DDP, FSDP) wraps its loss, too.

    head: as of `head_of`; None: logits are compared whole.
    """

    def __init__(self, student: Any, head: Callable[[torch.Tensor], torch.Tensor] | None, checkpointing: bool) -> None:
        super().__init__()
        self.student = student
        self.head = head
        self._checkpointing = checkpointing
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        # How FSDP finds the layers.
        self._no_split_modules = list(student._no_split_modules or [])

    def train(self, mode: bool = True) -> "Distilled":
        """The student is not told: dropout would make it differ from its teacher. Only checkpointing needs to be."""
        super().train(mode)
        self.student.train(mode and self._checkpointing)
        return self

    def forward(
        self, tokens: torch.Tensor, scored: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """tokens (B, L); scored (B, L): tokens whose prediction counts, the first of a row never.

        wanted: what the teacher gives, hidden states (B, L, H) or logits (B, L, V). In training, "loss" is the mean
        over rows of the mean KL of a row. In evaluation, "losses" and "divergences" are the negative log-likelihood and
        the KL of each scored token, the latter 0 without `wanted`.
        """
        states = last_states(self.student, tokens) if self.head else self._logits(tokens)
        states, scored = states[:, :-1], scored[:, 1:]
        own, targets = states[scored], tokens[:, 1:][scored]
        answers = None if wanted is None else wanted[:, :-1][scored].to(states.dtype)
        if not self.training or answers is None:
            return self._measured(own, targets, answers)
        weights = (scored / (scored.sum(1, keepdim=True).clamp(min=1) * len(scored)))[scored]
        if self.head is None:
            return {"loss": (weights * divergences(answers.float().log_softmax(-1), own.float())).sum()}
        return {"loss": HeadDivergence.apply(own, answers, weights, self.head)}

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.student(input_ids=tokens, use_cache=False).logits
        return logits

    def _measured(
        self, states: torch.Tensor, targets: torch.Tensor, answers: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Chunk by chunk, as in training. states, answers: (N, H or V). targets: (N)."""
        losses, apart = [], []
        rows = chunk_rows(self.head, states)
        for start in range(0, len(states), rows):
            at = slice(start, start + rows)
            logits = (self.head(states[at]) if self.head else states[at]).float()
            losses.append(functional.cross_entropy(logits, targets[at], reduction="none"))
            if answers is not None:
                target = (self.head(answers[at]) if self.head else answers[at]).float().log_softmax(-1)
                apart.append(divergences(target, logits))
        found = torch.cat(losses)
        return {"losses": found, "divergences": torch.cat(apart) if apart else torch.zeros_like(found)}


class Teacher:
    """The base, and what it gave to rows of text that come again. file: where that is kept, or None.

    states: whether last hidden states are asked for, rather than logits.
    """

    def __init__(self, model: Any, states: bool, rows: int = 0, file: Path | None = None) -> None:
        self.model, self._states = model, states
        self._rows, self._file = rows, file
        self._kept: torch.Tensor | None = None
        self._known: set[int] = set()

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """For tokens (B, L): last hidden states (B, L, H) or logits (B, L, V). numbers (B): of the rows, -1 for those
        that do not come again. Row by row, so that what a row is given with changes nothing."""
        return torch.cat([self._row(row[None], int(number)) for row, number in zip(tokens, numbers, strict=True)])

    def _row(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        if number in self._known and self._kept is not None:
            return self._kept[number].to(tokens.device)[None]
        if self._states:
            found = last_states(self.model, tokens)
        else:
            found = self.model(input_ids=tokens, use_cache=False).logits
        if number >= 0 and self._file is not None:
            if self._kept is None:
                shape = torch.Size((self._rows, *found.shape[1:]))
                kept = torch.from_file(str(self._file), shared=True, size=shape.numel(), dtype=found.dtype)
                self._kept = kept.view(shape)
            self._kept[number] = found[0].cpu()
            self._known.add(number)
        return found
