"""The weights form: probabilities that a layer lends, and their products with values.

Probabilities are made, lent and used in blocks of query tokens that fit in a processor's cache. Where each token sees
only those before it, and no mask says more, a block ends at its last token's key: half of the pairs of a prompt are
never computed, as in the kernels of causal attention.

Letters in shape comments as in `shared_attention`; R is the number of tokens in a block, E that of the keys it may see.
"""

import torch
from torch import nn

from .shared_attention_arguments import unlike

# Folding heads into tokens makes a graph with a dynamic number of tokens refuse some of them. (From torch 2.7 on.)
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

BLOCK = 128
"""Query tokens in a block of probabilities."""


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, for families whose modeling file does not offer its own for any number of heads.

    query: (B, H, T, D); key, value: (B, G, S, D). Returns the output (B, T, H, D) and the weights (B, H, T, S).
    Raises NotImplementedError for what it does not compute.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(unlike(f"attention takes {' and '.join(unknown)}, which this family's did not,"))
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def additive(mask, query, length):
    """A mask as eager attention adds it: SDPA's may be boolean or longer than the keys."""
    if mask is None:
        return None
    mask = mask[..., :length]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def causal_mask(query, start, stop):
    """What tokens start to stop see of the keys before stop, to be added: (1, 1, stop - start, stop)."""
    mask = query.new_full((1, 1, stop - start, stop), torch.finfo(query.dtype).min)
    return mask.triu_(start + 1)


def blocks_of(tokens, length, triangular, whole):
    """The blocks of T tokens over S keys: [(first token, last token + 1, keys seen)]. triangular: as kernels mean
    causal attention without a mask, the first token sees the first key, whatever else a static cache has room for."""
    if whole:  # without a loop, which would fix the number of tokens in an exported graph
        return [(0, tokens, tokens if triangular else length)]
    ends = [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
    return [(start, stop, stop if triangular else length) for start, stop in ends]


def pairs_of(tokens, length, triangular):
    """How many probabilities each head computes, of T tokens over S keys."""
    if not triangular:
        return tokens * length
    return sum((stop - start) * seen for start, stop, seen in blocks_of(tokens, length, True, False))


def probabilities(eager, module, query, key, mask, group, arguments):
    """(B, O, R, E) of query (B, O, R, D) and key (B, O / group, E, D), by a family's eager function.

    module: the attention module as the function should see it, with a method `grouped` to see it with another group.
    """
    heads, tokens = query.shape[1:3]
    folded = 1 if module.names.sinks or is_exporting() else group
    if folded > 1:
        # Queries that read one key stand in as so many tokens of one head, so that no key is repeated.
        if mask is not None and mask.shape[1] > 1:
            mask = mask.unflatten(1, (-1, group)).flatten(2, 3)
        elif mask is not None and tokens > 1:
            mask = torch.cat([mask] * group, dim=2)
        query, group = query.unflatten(1, (heads // group, group)).flatten(2, 3), 1
    # Zero-width values: only the weights are wanted here.
    weights = eager(module.grouped(group), query, key, key[..., :0], mask, **arguments)[1]
    return weights.unflatten(2, (folded, tokens)).flatten(1, 2)


def weigh(weights, value):
    """Weights (B, H, R, E) times values (B, G, S, D) -> (B, R, H, D), without repeating the values."""
    _, heads, tokens, seen = weights.shape
    weights, group = weights.to(value.device), heads // value.shape[1]
    value = value if value.shape[2] == seen else value[:, :, :seen]
    if group == 1 or is_exporting():
        return torch.matmul(weights, value.repeat_interleave(group, dim=1) if group > 1 else value).transpose(1, 2)
    folded = weights.unflatten(1, (-1, group)).flatten(2, 3)
    return torch.matmul(folded, value).unflatten(2, (group, tokens)).flatten(1, 2).transpose(1, 2)
