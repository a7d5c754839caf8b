"""Low-rank keys: some KV groups cache their keys in fewer numbers, before these are turned by position.

After Eigen Attention (Saxena et al., arXiv 2408.05646). The key of a treated group at position p is turned(c + U z, p):
U (D, r) has orthonormal columns, z has r numbers, and z is what is cached. Whatever the family's forward makes of keys
(normalised, turned), this code turns back, reduces to z, and expands and turns again at use:

    family: project ... turn -> encode: turn back, z = U'(key - c) -> cache -> decode: turned(c + U z) -> attention

If nothing but a projection makes keys, it has r rows for a treated group (`z = E x`), and its outputs are expanded at
once. Otherwise, as with norms of keys or a fused projection, the projection is as in the base, and `encoder` reduces
what comes of it: z = E key.

Which position a cached token has is told by the call, not by the cache: that of the newest tokens, less the number of
tokens since, counted in real ones if the caller's positions leave padding out. So a cache may be cropped, reordered,
quantised or continued as any other.

Letters in shape comments are those of `modeling_shared_attention`; r is the rank of a group, W the width of what a
token caches: D numbers of each full group, then the ranks of the treated ones.
"""

import sys
from inspect import signature

import torch
from torch import nn


class LowRank:
    """Low-rank keys in one stack. stack: see `modeling_shared_attention.treat`. Raises ValueError for ranks that cannot
    be."""

    divisible = False

    def __init__(self, stack):
        self.layers, self.shapes = {}, stack.shapes
        for layer, groups in stack.layers.items():
            heads, group, size = stack.shapes[layer]
            for number, told in groups.items():
                if number not in range(heads // group) or not 0 < told["keys"] < size:
                    raise ValueError(
                        f"shared_attention: layer {layer} KV group {number} has keys of rank {told['keys']}, but the "
                        f"model has {heads // group} groups with {size} numbers a key."
                    )
            # By the numbers that the groups have in the layer, some of which other treatments may have taken.
            heads = stack.heads[layer]
            self.layers[layer] = {heads[number * group] // group: told for number, told in groups.items()}

    def touches(self, layer):
        return layer in self.layers

    def own_heads(self, layer):
        return tuple(range(self.shapes[layer][0]))

    def enter(self, attention):
        """Give an attention module its bases, and a projection of keys that is as short as the checkpoint's."""
        names, groups = attention.names, attention.plan.own_groups
        ranks = {group: told["keys"] for group, told in sorted(self.layers[attention.plan.layer].items())}
        short = is_short(names)
        weight = getattr(attention, names.key if short else names.fused or names.key).weight
        attention.low_rank = Bases(ranks, groups, attention.size, weight, encodes=not short)
        module = sys.modules[type(attention).__bases__[1].__module__]
        attention.low_rank.turner = Turner(module, names, attention, attention.plan.layer, attention.model_config)
        if attention.low_rank.turner.lacking:
            raise RuntimeError(attention.unlike(f"{module.__name__} has no apply_rotary_pos_emb"))
        if short:
            attention.replace(names.key, ShortProjection(getattr(attention, names.key), attention.low_rank))

    def codec(self, attention, exchange, groups):
        return Codec(attention.low_rank, exchange, groups)

    def attend(self, call, query, key, value, mask, then):
        """Keys that were not cached, so that nothing has reduced them, are reduced here."""
        bases = call.attention.low_rank
        if key is not None and bases.encoder is not None and key.shape[-2] == query.shape[-2]:
            key = Codec(bases, call.exchange, call.groups).reduced(key)
        return then(query, key, value, mask)


def is_short(names):
    """Whether the projection of keys in a checkpoint has as many rows as numbers are cached: if it alone makes keys."""
    return not (names.fused or names.transposed or names.key_norm or names.value_limit)


class Layout:
    """How keys of some KV groups lie in what is cached: those of full groups, then those of the treated ones."""

    def __init__(self, groups, ranks, size):
        self.full = [group for group in groups if group not in ranks]
        self.numbers = len(self.full) * size
        self.width = self.numbers + sum(ranks.values())
        # Where each own group's key is among the full ones and the treated ones after them.
        order = [*self.full, *ranks]
        self.places = [order.index(group) for group in groups]
        self.treated = [groups.index(group) for group in ranks]
        self.whole = [groups.index(group) for group in self.full]

    def joined(self, full, treated):
        """Keys of the full groups and of the treated ones, in the order of the groups. (B, ., S, D) each."""
        return treated if full is None or not full.shape[1] else torch.cat([full, treated], dim=1)[:, self.places]


class Bases(nn.Module):
    """The bases of the treated groups of one layer.

    basis: (sum of ranks, D), the rows of a group are orthonormal. offset: (treated groups, D). encoder: (sum of ranks,
    D), or None if the projection of keys is short. ranks: by KV group. groups: those that own keys, in order.
    """

    def __init__(self, ranks, groups, size, like, encodes):
        super().__init__()
        self.ranks, self.size, self.layout = ranks, size, Layout(groups, ranks, size)
        total = sum(ranks.values())

        def made(*shape):
            return nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device), like.requires_grad)

        self.basis, self.offset = made(total, size), made(len(ranks), size)
        self.register_parameter("encoder", made(total, size) if encodes else None)

    def coded(self, keys):
        """(B, treated groups, T, D), not turned -> (B, T, sum of ranks)"""
        matrix = self.basis if self.encoder is None else self.encoder
        keys = keys - self.offset[:, None].to(keys.dtype) if self.encoder is None else keys
        rows = matrix.to(keys.dtype).split(list(self.ranks.values()))
        return torch.cat([keys[:, at] @ part.T for at, part in enumerate(rows)], dim=-1)

    def expanded(self, codes):
        """(B, S, sum of ranks) -> (B, treated groups, S, D), not turned."""
        ranks = list(self.ranks.values())
        if len(set(ranks)) == 1:
            rows = self.basis.view(len(ranks), ranks[0], self.size)
            keys = torch.matmul(codes.unflatten(-1, (len(ranks), ranks[0])).transpose(1, 2), rows)
        else:
            pairs = zip(codes.split(ranks, dim=-1), self.basis.split(ranks), strict=True)
            keys = torch.stack([part @ rows for part, rows in pairs], dim=1)
        return keys + self.offset[:, None]


class ShortProjection(nn.Module):
    """A projection of keys with r rows for a treated group: (B, T, hidden) -> (B, T, own groups * D)."""

    def __init__(self, projection, bases):
        super().__init__()
        weight, bias = projection.weight, projection.bias
        self.down = nn.Linear(
            weight.shape[1], bases.layout.width, bias=bias is not None, dtype=weight.dtype, device=weight.device
        )
        self.down.requires_grad_(weight.requires_grad)
        self.__dict__["bases"] = bases  # the attention module's own, and no part of this one

    def forward(self, states):
        bases, layout, made = self.bases, self.bases.layout, self.down(states)
        full, codes = made.split([layout.numbers, layout.width - layout.numbers], dim=-1)
        full = full.unflatten(-1, (-1, bases.size)).transpose(1, 2)
        return layout.joined(full, bases.expanded(codes)).transpose(1, 2).flatten(2)


class Turner:
    """How a family turns the keys of one layer by position. module: of its code. layer: the number in its stack.

    lacking: whether the layer does turn keys, and the module has no function for that.
    """

    def __init__(self, module, names, attention, layer, config, size=None):
        self.rotates, self.slices = rotates(attention, names.rotary), False
        self.rotate = getattr(module, "apply_rotary_pos_emb", None) if self.rotates else None
        self.lacking = self.rotates and self.rotate is None
        kinds = getattr(config, "layer_types", None)
        self.kind = kinds[layer] if kinds else None
        if self.rotate is None:
            return
        # Of keys that turn in part, some functions take all numbers, others only those that turn.
        size = size or attention.size
        whole, half = torch.zeros(1, 1, 1, size, device="cpu"), size // 2
        try:
            cosines = torch.zeros(1, 1, half, device="cpu")
            self.slices = self.rotate(whole, whole, cosines, cosines)[1].shape != whole.shape
        except RuntimeError:
            self.slices = True

    def turn(self, keys, turns, back=False):
        """Keys (B, G, S, D) turned by cosines and sines (B or 1, S, width), or turned back; as they are without any."""
        if turns is None or self.rotate is None:
            return keys
        cos, sin = (part.to(keys.device) for part in turns)
        width = cos.shape[-1] if self.slices else keys.shape[-1]
        part = keys[..., :width]
        turned = self.rotate(part[:, :0], part, cos, -sin if back else sin)[1].to(keys.dtype)  # of no query
        if back:  # some families scale keys as they turn them
            turned = turned / (cos * cos + sin * sin)[:, None, :, :1]
        return turned if width == keys.shape[-1] else torch.cat([turned, keys[..., width:]], dim=-1)


def rotates(attention, rule):
    """Whether an attention module turns queries and keys by position. rule: `rotary` of `MODULES`."""
    if rule == "no_rope_layers":
        return bool(attention.use_rope)
    if rule == "sliding":
        window = getattr(attention, "sliding_window", None)
        return getattr(attention, "is_sliding", True) if window is not None else hasattr(attention, "is_sliding")
    return rule != "none"


class Codec:
    """What of a layer's keys is cached in one pass, and the keys again; see `CacheView` in the file beside. groups: the
    KV groups that have these keys, all treated ones among them; others may be cached elsewhere."""

    def __init__(self, bases, exchange, groups):
        self.bases, self.exchange, self.layout = bases, exchange, Layout(groups, bases.ranks, bases.size)

    def codes(self, keys):
        """Turned keys (B, own groups, T, D) of new tokens -> the treated groups' (B, T, sum of ranks)."""
        bases, turner = self.bases, self.bases.turner
        keys = keys[:, self.layout.treated].float()
        back = turner.turn(keys, self.turns(keys), back=True)
        return bases.coded(back)

    def keys(self, codes, full, turns):
        """What `codes` were made of, and the keys of the full groups (B, ., S, D): (B, own groups, S, D)."""
        return self.layout.joined(full, self.bases.turner.turn(self.bases.expanded(codes), turns))

    def reduced(self, keys):
        """Turned keys of new tokens as they would come out of a cache."""
        codes = self.codes(keys).to(keys.dtype)
        return self.keys(codes, keys[:, self.layout.whole], self.turns(keys))

    def full(self, keys):
        """Turned keys of new tokens for a cache with no room of another shape: as they would come out of one. What is
        reduced once more stays as it is."""
        return keys if self.bases.encoder is None else self.reduced(keys)

    def encode(self, keys):
        """(B, own groups, T, D) -> (B, 1, T, W)"""
        full = keys[:, self.layout.whole].transpose(1, 2).flatten(2)
        self.tokens = keys.shape[-2]
        return torch.cat([full, self.codes(keys).to(keys.dtype)], dim=-1)[:, None]

    def decode(self, slot):
        """(B, 1, S, W) -> (B, own groups, S, D)"""
        numbers = self.layout.numbers
        full = slot[:, 0, :, :numbers].unflatten(-1, (-1, self.bases.size)).transpose(1, 2) if numbers else None
        return self.keys(slot[:, 0, :, numbers:], full, self.turns(slot, slot.shape[-2]))

    def turns(self, like, slots=None):
        """Cosines and sines, (B or 1, ., width) each, of the new tokens in `like` (., ., T, .), or of that many slots;
        None if the layer does not turn keys. They are made once a pass for all layers of a kind."""
        turner, notes = self.bases.turner, self.exchange.notes
        if not turner.rotates:
            return None
        name = ("turns", turner.kind, slots, like.dtype, like.device)
        if name not in notes:
            tokens = like.shape[-2] if slots is None else self.tokens
            positions = new_positions(self.exchange, tokens, like.device)
            if slots is not None:
                positions = slot_positions(self.exchange, positions, slots)
            notes[name] = cosines(self.exchange.stack, like, positions, turner.kind)
        return notes[name]


def cosines(stack, like, positions, kind):
    """Cosines and sines of positions (B or 1, S), as the rotary embedding of a stack makes them."""
    embedding = stack.rotary_emb
    if kind == "sliding_attention" and hasattr(stack, "rotary_emb_local"):  # until transformers 5
        embedding = stack.rotary_emb_local
    told = {"layer_type": kind} if "layer_type" in signature(embedding.forward).parameters else {}
    return embedding(like, positions, **told)[:2]


def new_positions(exchange, tokens, device):
    """Positions of the new tokens, (B or 1, T), as the caller told them, or as its model counts them."""
    told = exchange.given.get("position_ids")
    if told is None and exchange.given.get("cache_position") is not None:
        told = exchange.given["cache_position"][None]
    if told is None:
        told = (torch.arange(tokens, device=device) + exchange.past)[None]
    return told.to(device)


def slot_positions(exchange, new, slots):
    """Positions of all that is cached, (B or 1, slots). new: (B or 1, T), those of the last tokens.

    A sliding cache holds the last tokens, and a static one has room for more: what lies there is never seen.
    """
    tokens, device = new.shape[-1], new.device
    total = exchange.past + tokens
    first = total - slots
    first = first.clamp(min=0) if isinstance(first, torch.Tensor) else max(first, 0)
    index = torch.arange(slots, device=device) + first  # of each slot's token in its row
    last, ago = new[:, -1:], total - 1 - index
    positions = last - ago
    real = _real(exchange.given.get("attention_mask"))
    if real is not None and exchange.given.get("position_ids") is not None:
        # Positions may leave padding out: then it is real tokens that tell how far back one is.
        rank = real.to(device).long().cumsum(-1) - 1
        columns = rank.shape[-1]
        newest = rank[:, -1:] if isinstance(total, torch.Tensor) else rank[:, min(total, columns) - 1, None]
        # A mask may have columns for the last tokens alone.
        counts = (newest == last) & (total <= columns)
        positions = torch.where(counts, rank[:, index.clamp(max=columns - 1)], positions)
    place = index - exchange.past
    told = new[:, place.clamp(0, tokens - 1)]
    return torch.where((place >= 0) & (place < tokens), told, positions).clamp(min=0)


def _real(mask):
    """(B, S) bool: which tokens are no padding, or None if it is not known. mask: what a model is called with."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask.bool()
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen.any(-2)[:, 0]
