"""Attention of one layer over a long sequence, some queries at a time, so that no matrix of probabilities is kept.

Letters in shape comments: B sequences, H query heads, G KV groups, T and S tokens, D head size.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sa_convert.observe.attention_call import Call
from sa_convert.treatments.trial import Trial

BLOCK = 256
"""Queries at a time."""


UNLIKE = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that scaled dot product attention does not know."""


class Attending:
    """One call, as trials change it.

    lent: what layers before have left, by their numbers. causal: no query sees a later token, so keys behind the last
    query of a block are left out. groups: KV groups of the layer. plain: no trial changes it, and torch's scaled dot
    product attention computes the same.
    """

    def __init__(
        self,
        call: Call,
        layer: int,
        trials: Sequence[Trial],
        lent: Mapping[int, Call],
        *,
        causal: bool,
        groups: int,
        plain: bool = False,
    ) -> None:
        self.call, self.layer, self.trials, self.lent = call, layer, trials, lent
        self.causal, self.groups, self.plain = causal, groups, plain

    @cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """The first query of each block, and the first of the next one."""
        tokens = self.call.query.shape[2]
        return [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]

    def probabilities(self, start: int, stop: int) -> torch.Tensor:
        """(B, H, stop - start, S) of these queries."""

        def lent(layer: int) -> torch.Tensor:
            return self.lent[layer].rows(start, stop, self.causal).probabilities()

        used = self.call.rows(start, stop, self.causal).probabilities()
        for trial in self.trials:
            used = trial.probabilities(self.layer, used, lent, self.groups)
        return used

    def all_probabilities(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The first query of each block, with its probabilities."""
        for start, stop in self.blocks:
            yield start, self.probabilities(start, stop)

    def output(self, value: torch.Tensor) -> torch.Tensor:
        """(B, T, H, D), of values (B, G, S, D). Where gradients are wanted, probabilities are computed once more on the
        way back."""
        if self.plain and not any(self.call.arguments.get(name) is not None for name in UNLIKE):
            call, scale = self.call, self.call.arguments.get("scaling")
            part = scaled_dot_product_attention(
                call.query, call.key, value, attn_mask=call.mask, scale=scale, enable_gqa=True
            )
            return part.transpose(1, 2).contiguous()
        changes = torch.is_grad_enabled() and any(
            part.requires_grad for call in (self.call, *self.lent.values()) for part in (call.query, call.key, value)
        )
        parts: list[Any] = []
        for start, stop in self.blocks:
            if changes:
                parts.append(checkpoint(self._part, start, stop, value, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._part(start, stop, value))
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()

    def _part(self, start: int, stop: int, value: torch.Tensor) -> torch.Tensor:
        """(B, H, stop - start, D)."""
        used = self.probabilities(start, stop)
        batch, heads, tokens, length = used.shape
        grouped = used.reshape(batch, self.groups, -1, length)  # (B, G, heads of a group * T, S)
        return torch.matmul(grouped, value[:, :, :length]).view(batch, heads, tokens, -1)
