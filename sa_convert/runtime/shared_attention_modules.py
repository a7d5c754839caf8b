"""Attention of families that take special steps, or whose own code does not go through the attention interface.

Letters in shape comments as in `shared_attention`.
"""

from inspect import signature

import torch
from torch import nn

from .shared_attention import SharedAttention
from .shared_attention_cache import AttentionCache
from .shared_attention_weights import additive


class GPT2Attention(SharedAttention):
    """GPT-2: how scores are scaled is a matter of its config."""

    def _scaling(self):
        scaling = self.size**-0.5 if self.scale_attn_weights else 1.0
        return scaling / (self.layer_idx + 1) if self.scale_attn_by_inverse_layer_idx else scaling


class FalconAttention(SharedAttention):
    """Falcon: rotary embeddings or ALiBi."""

    needs = ("alibi", "positions")

    def _run(self, call):
        mask, positions = call.mask, call.positions
        if call.alibi is not None:
            positions = None
            if (self.model_config._attn_implementation or "eager") == "eager":
                # The mask holds ALiBi as well: with eager attention Falcon adds it twice, and so its models do here.
                bias = call.alibi.view(call.states.shape[0], len(self.plan.heads), 1, -1) * self.size**-0.5
                mask = bias + mask
        return self._plain(call, mask, positions)


class BloomAttention(SharedAttention):
    """BLOOM: ALiBi, and the residual is added here."""

    needs = ("alibi", "residual")

    def _run(self, call):
        mask = call.alibi.view(call.states.shape[0], len(self.plan.heads), 1, -1)  # (B, H, 1, S)
        if call.mask is not None:
            mask = mask + call.mask
        output, weights = self._plain(call, mask, None)
        output = nn.functional.dropout(output, p=self.hidden_dropout, training=self.training)
        return call.residual + output, weights


class GPTJAttention(SharedAttention):
    """GPT-J: rotary embeddings of pairs of neighbours. The stack makes them since 5.24; before, each layer reads them
    from a table by position."""

    def _run(self, call):
        sines = call.positions
        if sines is None and self.plan.own:
            table = self._get_embed_positions(call.position_ids)  # (B, positions, rotary size)
            places = call.position_ids.unsqueeze(-1).expand(-1, -1, table.shape[-1])
            sines = table.gather(1, places).to(call.states.dtype).chunk(2, dim=-1)
        return self._plain(call, call.mask, sines)

    def _turn(self, query, key, positions):
        sin, cos = positions
        width = self.rotary_dim or self.size

        def turn(states):
            turned = self.rotate(states[..., :width].transpose(1, 2), sin, cos).transpose(1, 2)
            return torch.cat([turned, states[..., width:]], dim=-1)

        return turn(query), turn(key)


class EncoderDecoderAttention(SharedAttention):
    """Self-attention and cross-attention of BART and its kin."""

    needs = ("source",)

    def _run(self, call):
        output, weights = self._across(call, call.mask)
        return self._output(output, call.states), weights

    def _across(self, call, mask):
        """Heads' outputs (B, T, H, D) and weights. mask: as in `call`, or what makes it of queries and their keys'
        number."""
        plan, cross, cache = self.plan, call.source is not None, None
        if call.cache is not None:
            cache = AttentionCache(call.cache, plan.layer, cross)
        if cache is not None and cache.is_filled:
            query = self._split(getattr(self, self.names.query)(call.states)) if plan.own else None
            key, value = cache.read(len(plan.own_groups), len(plan.heads) // plan.group)
        else:
            query, key, value, _ = self._project(call.states, call.source)
            if cache is not None:
                key, value = cache.update(key, value, *(() if cross else self._extra(call)))
        if callable(mask):
            mask = mask(query if query is not None else value, value.shape[-2])
        return self._attend(query, key, value, mask, call)


class T5Attention(EncoderDecoderAttention):
    """T5: relative positions as a bias for each head, which the first layer computes for all."""

    needs = ("source", "bias")

    @property
    def _bias_holds_mask(self):
        """Until 5.14 the first layer adds the mask to the bias that it hands on, and probabilities come where asked."""
        return "output_attentions" in self.arguments.roles

    def _run(self, call):
        before, bias = 0, call.bias
        if call.cache is not None and call.source is None:
            before = AttentionCache(call.cache, self.plan.layer).length()
            before = before.clone() if isinstance(before, torch.Tensor) else before

        def combined(states, length):
            """Bias and mask together: (1 or B, H, T, S), or None."""
            nonlocal bias
            if call.source is not None:
                # A bias of cross-attention is nothing but the mask.
                return bias if self._bias_holds_mask and bias is not None else call.mask
            if bias is None:
                bias = self._bias(call, length, before)
                if self._bias_holds_mask and call.mask is not None:
                    bias = bias + additive(call.mask, states, length)
            return bias if self._bias_holds_mask else self._masked(bias, call.mask, length)

        output, weights = self._across(call, combined)
        output = self._output(output, call.states)
        if self._bias_holds_mask and not call.output_attentions:
            return output, bias
        return output, bias, weights

    def _bias(self, call, length, before):
        """Relative positions of T new tokens to S: (1, H, T, S)."""
        tokens, device = call.states.shape[1], call.states.device
        if "cache_position" in signature(self.compute_bias).parameters:  # until 5.3
            return self.compute_bias(length, length, device, call.cache_position)[:, :, -tokens:]
        return self.compute_bias(tokens, length, device, before)

    def _masked(self, bias, mask, length):
        """The bias, and the least number wherever a token does not see: not their sum, which half precision lacks."""
        tokens = bias.shape[-2]
        if mask is None and not (self.is_causal and tokens > 1):
            return bias
        if mask is None:
            mask = torch.ones(tokens, length, dtype=torch.bool, device=bias.device).tril()
        mask = mask[..., :length]
        return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask

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
