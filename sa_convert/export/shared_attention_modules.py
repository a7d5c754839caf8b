"""Attention of families that take special steps, or whose own code does not go through the attention interface.

Letters in shape comments as in `shared_attention`.
"""

import torch
import transformers
from torch import nn

from .shared_attention import SharedAttention
from .shared_attention_cache import AttentionCache
from .shared_attention_weights import additive

_TRANSFORMERS_4 = transformers.__version__.startswith("4.")


class GPT2Attention(SharedAttention):
    """GPT-2: how scores are scaled is a matter of its config."""

    def _scaling(self):
        scaling = self.size**-0.5 if self.scale_attn_weights else 1.0
        return scaling / (self.layer_idx + 1) if self.scale_attn_by_inverse_layer_idx else scaling


class FalconAttention(SharedAttention):
    """Falcon: rotary embeddings or ALiBi."""

    def forward(
        self, hidden_states, alibi=None, attention_mask=None, layer_past=None, position_embeddings=None, **kwargs
    ):
        if alibi is not None:
            position_embeddings = None
            if (self.model_config._attn_implementation or "eager") == "eager":
                # The mask holds ALiBi as well: with eager attention Falcon adds it twice, and so its models do here.
                bias = alibi.view(hidden_states.shape[0], len(self.plan.heads), 1, -1) * self.size**-0.5
                attention_mask = bias + attention_mask
        return self._plain(hidden_states, attention_mask, position_embeddings, layer_past, **kwargs)


class BloomAttention(SharedAttention):
    """BLOOM: ALiBi, and the residual is added here."""

    def forward(self, hidden_states, residual, alibi, attention_mask=None, layer_past=None, **kwargs):
        mask = alibi.view(hidden_states.shape[0], len(self.plan.heads), 1, -1)  # (B, H, 1, S)
        if attention_mask is not None:
            mask = mask + attention_mask
        output, weights = self._plain(hidden_states, mask, None, layer_past, **kwargs)
        return residual + nn.functional.dropout(output, p=self.hidden_dropout, training=self.training), weights


class GPTJAttention(SharedAttention):
    """GPT-J: rotary embeddings of pairs of neighbours, from a table by position."""

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **kwargs):
        return self._plain(hidden_states, attention_mask, position_ids, layer_past, **kwargs)

    def _turn(self, query, key, positions, kwargs):
        table = self._get_embed_positions(positions)  # (B, positions, rotary size)
        sincos = table.gather(1, positions.unsqueeze(-1).expand(-1, -1, table.shape[-1])).to(key.dtype)
        sin, cos = sincos.chunk(2, dim=-1)
        width = self.rotary_dim or self.size

        def turn(states):
            turned = self.rotate(states[..., :width].transpose(1, 2), sin, cos).transpose(1, 2)
            return torch.cat([turned, states[..., width:]], dim=-1)

        return turn(query), turn(key)


class EncoderDecoderAttention(SharedAttention):
    """Self-attention and cross-attention of BART and its kin."""

    def forward(self, hidden_states, key_value_states=None, past_key_values=None, attention_mask=None, **kwargs):
        output, weights = self._across(hidden_states, key_value_states, past_key_values, attention_mask, **kwargs)
        return self._output(output, hidden_states), weights

    def _across(self, hidden_states, source_states, past_key_values, mask, **kwargs):
        """Heads' outputs (B, T, H, D) and weights. source_states: the encoder's (B, S, hidden) for cross-attention."""
        plan, cross, cache = self.plan, source_states is not None, None
        if past_key_values is not None:
            cache = AttentionCache(past_key_values, self.layer_idx, cross)
        if cache is not None and cache.is_filled:
            query = self._split(getattr(self, self.names.query)(hidden_states)) if plan.own else None
            key, value = cache.read(len(plan.own_groups), len(plan.heads) // plan.group)
        else:
            query, key, value, _ = self._project(hidden_states, source_states)
            if cache is not None:
                positions = kwargs.get("cache_position")
                extra = () if cross or positions is None else ({"cache_position": positions},)
                key, value = cache.update(key, value, *extra)
        if callable(mask):
            mask = mask(query if query is not None else value, value.shape[-2])
        return self._attend(query, key, value, mask, kwargs)


class T5Attention(EncoderDecoderAttention):
    """T5: relative positions as a bias for each head, which the first layer computes for all."""

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **kwargs
    ):
        tokens, cross = hidden_states.shape[1], key_value_states is not None
        before = 0
        if past_key_values is not None and not cross:
            before = AttentionCache(past_key_values, self.layer_idx).length()
            before = before.clone() if isinstance(before, torch.Tensor) else before
        bias = position_bias

        def combined(states, length):
            """Bias and mask together: (1 or B, H, T, S), or None."""
            nonlocal bias
            if cross:
                # transformers 4 hands on a bias of nothing but the mask
                return bias if _TRANSFORMERS_4 and bias is not None else mask
            masked = additive(mask, states, length)
            if bias is None:
                bias = self._bias(tokens, length, before, kwargs, states.device)
                bias = bias + masked if _TRANSFORMERS_4 and masked is not None else bias
            if _TRANSFORMERS_4:
                return bias
            if masked is None and self.is_causal and tokens > 1:
                seen = torch.ones(tokens, length, dtype=torch.bool, device=states.device).tril()
                masked = additive(seen[None, None], states, length)
            return bias if masked is None else bias + masked

        output, weights = self._across(hidden_states, key_value_states, past_key_values, combined, **kwargs)
        output = self._output(output, hidden_states)
        if _TRANSFORMERS_4:
            return (output, bias, weights) if kwargs.get("output_attentions") else (output, bias)
        return output, bias, weights

    def _bias(self, tokens, length, before, kwargs, device):
        """Relative positions of T new tokens to S: (1, H, T, S). device: that of the states, since an offloaded weight
        is on none."""
        if _TRANSFORMERS_4:
            positions = kwargs["cache_position"]
            return self.compute_bias(length, length, device=device, cache_position=positions)[:, :, -tokens:]
        return self.compute_bias(tokens, length, device=device, past_seen_tokens=before)

    def _scaling(self):
        return 1.0


MODULES: dict[str, type[SharedAttention]] = {
    "gpt2": GPT2Attention,
    "falcon": FalconAttention,
    "bloom": BloomAttention,
    "gptj": GPTJAttention,
    "encoder_decoder": EncoderDecoderAttention,
    "t5": T5Attention,
}
"""By the name that a family's entry gives under `module`."""
