"""Attention shared across layers, for models of Hugging Face transformers.

*Shared Attention* (Liao & Vargas, arXiv 2407.12866) lets a layer use the attention weights that an earlier layer
computed. Here the choice is made per query head: a head either owns its attention, or reuses that of one source head.
A key/value group none of whose heads own their attention has no query and no key projection and caches no keys.

How it works in any model that dispatches through the attention interface of transformers:

- The layers of one forward pass share an `Exchange`, which travels with the call (never on a module), so that threads
  do not meet, nothing outlives the pass, and a checkpointed layer that is computed again finds the same tensors.
- The attention module keeps its family's own `forward`; it sees a config that names our attention function, which
  receives query and key as the family prepared them (normalised, rotated, cached), lends them, and fills in borrowed
  heads. A layer without any own head needs only its values, and runs `SharedAttention._plain`.
- Sharing weights equals attention over the source's query and key, so there are two forms (`shared_attention_attend`).
- A reusing head caches no keys. Values (and the keys that a layer still owns) lie in the cache's key slot, beside a
  zero-width value slot, so that every public cache operation keeps working on them.

Letters in shape comments: B batch, H query heads, O own query heads, G key/value groups, T query tokens, S cached
tokens, D head size.
"""

import torch
from torch import nn

from .shared_attention_arguments import Arguments, Call, is_paged, unlike
from .shared_attention_attend import Attending
from .shared_attention_cache import AttentionCache, PackedCache
from .shared_attention_exchange import EXCHANGE
from .shared_attention_paged import PagedCache, update_paged


class SharedAttention(Attending):
    """Mixed into the attention class of a family by `shared_attention_apply`: lends own heads, borrows the others'."""

    size: int  # D
    arguments: Arguments  # of the family's own forward
    needs: tuple[str, ...] = ()  # roles that the family's forward must have, beside the usual ones

    def forward(self, *args, **kwargs):
        names, plan = self.names, self.plan
        given = self.arguments.by_name(args, kwargs)
        if names.exchange == "positions":
            name = self.arguments.roles["positions"]
            *positions, given[EXCHANGE] = given[name]
            given[name] = tuple(positions)
        if plan is not None and (not plan.own or names.plain_forward):
            return self._run(self.arguments.by_role(given, EXCHANGE))
        if plan is None:
            given.pop(EXCHANGE, None)
        elif plan.packs_cache and given.get(self.arguments.roles.get("cache")) is not None:
            name = self.arguments.roles["cache"]
            given[name] = (PagedCache if is_paged(given[name]) else PackedCache)(given[name])
        outputs = super().forward(**given)
        if len(outputs) != 2:
            raise RuntimeError(unlike(f"{type(self).__name__} returns {len(outputs)} values instead of 2"))
        return outputs

    def _run(self, call: Call):
        """What the family's forward does, for any number of own heads. Families with steps of their own override it."""
        return self._plain(call, call.mask, call.positions)

    def _plain(self, call: Call, mask, positions):
        """Attention as families without special steps do it; of a layer that reuses wholly, values and output
        projection only. mask and positions: as the family uses them, else as in `call`."""
        query, key, value, gate = self._project(call.states)
        if query is not None:
            query, key = self._normalise(query, key)
            query, key = self._turn(query, key, positions)
        if is_paged(call.cache):
            key, value = update_paged(call.cache, key, value, self.plan.layer, call.rest)
        elif call.cache is not None:
            key, value = AttentionCache(call.cache, self.plan.layer).update(key, value, *self._extra(call))
        output, weights = self._attend(query, key, value, mask, call)
        return self._output(output, call.states, gate), weights

    def _extra(self, call):
        """What a cache's update takes besides: in transformers 4 the positions, for static caches; later it counts."""
        return () if call.cache_position is None else ({"cache_position": call.cache_position},)

    def _attend(self, query, key, value, mask, call):
        """As `attend`, with what a family's forward would have handed to the attention function."""
        arguments = dict(call.rest)
        if query is not None:
            arguments["scaling"] = self._scaling()
            arguments["dropout"] = self._dropout() if self.training else 0.0
        implementation = self.model_config._attn_implementation or "eager"
        return self.attend(call.exchange, implementation, query, key, value, mask, arguments)

    def _dropout(self):
        names = (self.names.dropout, "attention_dropout", "attn_dropout")
        rate = next((getattr(self, name) for name in names if hasattr(self, name)), 0.0)
        return rate.p if isinstance(rate, nn.Dropout) else rate

    def _scaling(self):
        return getattr(self, "scaling", self.size**-0.5)

    def _split(self, states):
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return states.view(*states.shape[:-1], -1, self.size).transpose(1, 2)

    def _project(self, hidden_states, source_states=None):
        """Query (B, O, T, D), key (B, own groups, S, D), both None where nothing is own, value (B, G, S, D), and the
        gate (B, T, H * D) or None. source_states: what keys and values are made of, if it is not the same."""
        names, own = self.names, self.plan.own
        if names.fused:
            return (*self._unfuse(getattr(self, names.fused)(hidden_states)), None)
        source_states = hidden_states if source_states is None else source_states
        value = self._split(getattr(self, names.value)(source_states))
        limit = getattr(self.model_config, names.value_limit or "", None)
        if limit is not None:
            value = value.clamp(min=-limit, max=limit)
        query = getattr(self, names.query)(hidden_states) if own or names.gate == "query" else None
        gate = None
        if names.gate == "query":
            query, gate = self._ungate(query)
        if not own:
            return None, None, value, gate
        return self._split(query), self._split(getattr(self, names.key)(source_states)), value, gate

    def _unfuse(self, states):
        """The fused projection's output (B, T, ...), apart. A layer that reuses holds own queries, own keys and all
        values, in this order; one that only lends has the order of its family."""
        plan, names = self.plan, self.names
        groups = len(plan.heads) // plan.group
        if names.fused_order == "groups" and not plan.reuses:
            states = states.view(*states.shape[:-1], groups, plan.group + 2, self.size)  # (B, T, G, ., D)
            query = states[..., :-2, :].flatten(2, 3)
            return tuple(part.transpose(1, 2) for part in (query, states[..., -2, :], states[..., -1, :]))
        sizes = [len(plan.own) * self.size, len(plan.own_groups) * self.size, groups * self.size]
        query, key, value = states.split(sizes, dim=-1)
        if not plan.own:
            return None, None, self._split(value)
        return self._split(query), self._split(key), self._split(value)

    def _ungate(self, states):
        """Queries and gates of one projection: a layer that reuses holds own queries, then all gates; one that only
        lends has each head's gate beside its query."""
        plan = self.plan
        if plan.reuses:
            return states.split([len(plan.own) * self.size, len(plan.heads) * self.size], dim=-1)
        pairs = states.view(*states.shape[:-1], len(plan.heads), 2, self.size)  # (B, T, H, 2, D)
        return pairs[..., 0, :].flatten(-2), pairs[..., 1, :].flatten(-2)

    def _normalise(self, query, key):
        names = self.names
        if names.query_norm and hasattr(self, names.query_norm):
            query, key = getattr(self, names.query_norm)(query), getattr(self, names.key_norm)(key)
        return query, key

    def _turn(self, query, key, positions):
        """Rotate queries and keys by their positions, in families that do."""
        if positions is None:
            return query, key
        cos, sin = positions
        width = cos.shape[-1]  # partial rotary: the first `width` of D turn
        query_turned, key_turned = self.rotate(query[..., :width], key[..., :width], cos, sin)
        if width == self.size:
            return query_turned, key_turned
        query = torch.cat([query_turned, query[..., width:]], dim=-1)
        return query, torch.cat([key_turned, key[..., width:]], dim=-1)

    def _output(self, attention, hidden_states, gate=None):
        """(B, T, H, D) -> (B, T, hidden)"""
        names = self.names
        output = attention.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if gate is not None:
            output = output * torch.sigmoid(gate)
        if names.output_norm:
            output = getattr(self, names.output_norm)(output)
        if not names.output_outside:
            output = getattr(self, names.output)(output)
        if names.output_dropout:
            output = getattr(self, names.output_dropout)(output)
        return nn.functional.dropout(output, p=getattr(self, "residual_dropout", 0.0), training=self.training)
