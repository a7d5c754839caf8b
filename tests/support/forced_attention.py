"""The reference: the unmodified base model, with probabilities of borrowers forced to their sources'.

It shares no code with sa_convert. The family's own eager attention function computes every head. Then the
probabilities of borrowers are overwritten, and the output is computed again from them and the values.
"""

import sys
from contextlib import contextmanager

import torch


@contextmanager
def forced_attention(base, rows: dict[int, list]):
    """While open, `base` (in eager mode) attends by the map: {layer: [None or [source layer, source head], ...]}."""
    family = sys.modules[type(base).__module__]
    original = family.eager_attention_forward
    weights_of: dict[int, torch.Tensor] = {}

    def forced(module, query, key, value, attention_mask, **arguments):
        weights = original(module, query, key, value, attention_mask, **arguments)[1].clone()
        for head, source in enumerate(rows.get(module.layer_idx) or ()):
            if source is not None:
                weights[:, head] = weights_of[source[0]][:, source[1]]
        weights_of[module.layer_idx] = weights
        repeated = torch.repeat_interleave(value, query.shape[1] // value.shape[1], dim=1)
        return torch.einsum("bhts,bhsd->bthd", weights, repeated), weights

    family.eager_attention_forward = forced
    try:
        yield
    finally:
        family.eager_attention_forward = original


@torch.no_grad()
def forced_logits(base, rows: dict[int, list], ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (B, T, vocabulary) of the base under the map."""
    with forced_attention(base, rows):
        return base(ids, attention_mask=mask, use_cache=False).logits
