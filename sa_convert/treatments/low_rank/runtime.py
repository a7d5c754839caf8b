"""Low rank: some KV groups cache their keys, or their values, in fewer numbers.

After Eigen Attention (Saxena et al., arXiv 2408.05646). A basis of values is part of the projections before and after
attention, and one of keys that are not turned by position of those of queries and keys: such heads are narrower, and
nothing else changes. The family's forward sees them filled up with zeros, which are neither cached nor multiplied:

    narrow projection, filled up -> family -> cache (narrow) -> attention -> filled up -> cut, narrow projection

The key of a treated group that is turned at position p is turned(c + U z, p): U (D, r) has orthonormal columns, z has
r numbers, and z is what is cached. Whatever the family's forward makes of keys (normalised, turned), this code turns
back, reduces to z, and expands and turns again at use:

    family: project ... turn -> encode: turn back, z = U'(key - c) -> cache -> decode: turned(c + U z) -> attention

If nothing but a projection makes keys, it has r rows for a treated group (`z = E x`), and its outputs are expanded at
once. Otherwise, as with norms of keys or a fused projection, the projection is as in the base, and `encoder` reduces
what comes of it: z = E key. If such keys are not turned, queries are multiplied with U instead: (U z)'q = z'(U'q).

Which position a cached token has is told by the call, not by the cache: that of the newest tokens, less the number of
tokens since, counted in real ones if the caller's positions leave padding out. So a cache may be cropped, reordered,
quantised or continued as any other.

Letters in shape comments are those of `modeling_shared_attention`; r is the rank of a group, W the width of what a
token caches: D numbers of each full group, and the ranks of the treated ones.
"""

import sys
from inspect import signature
from itertools import groupby

import torch
from torch import nn


class LowRank:
    """Low rank in one stack. stack: see `modeling_shared_attention.treat`. Raises ValueError for ranks that cannot
    be."""

    divisible = False

    def __init__(self, stack):
        # By the numbers that KV groups have in the layer: values of those that others have taken are narrow, too.
        self.layers, self.shapes = stack.told, stack.shapes
        for layer, groups in self.layers.items():
            size, count = stack.sizes[layer]
            for number, told in groups.items():
                for what, rank in told.items():
                    if number not in range(count) or not 0 < rank < size:
                        raise ValueError(
                            f"shared_attention: layer {layer} KV group {number} has {what} of rank {rank}, but the "
                            f"model has {count} groups with {size} numbers a head."
                        )

    def touches(self, layer):
        return layer in self.layers

    def own_heads(self, layer):
        return tuple(range(self.shapes[layer][0]))

    def value_size(self, layer, group):
        return self.layers[layer].get(group, {}).get("values", self.shapes[layer][2])

    def enter(self, attention):
        """Give an attention module its bases, and projections that are as narrow as the checkpoint's."""
        names, plan, size = attention.names, attention.plan, attention.size
        told, groups = sorted(self.layers[plan.layer].items()), range(plan.heads // plan.group)
        ranks, values = ({group: each[side] for group, each in told if side in each} for side in ("keys", "values"))
        turned = rotates(attention, names.rotary)
        folds, short = not turned and is_linear(names), turned and is_short(names)
        weight = getattr(attention, names.key if short else names.fused or names.key).weight if plan.own else None
        bases = attention.low_rank = Bases(plan, ranks, values, size)
        if ranks and not folds:
            bases.make(weight, turned, encodes=not short)
        if ranks and turned:
            module = sys.modules[type(attention).__bases__[1].__module__]
            bases.turner = Turner(module, names, attention, plan.layer, attention.model_config)
            if bases.turner.lacking:
                raise RuntimeError(attention.unlike(f"{module.__name__} has no apply_rotary_pos_emb"))
        if short and ranks:
            attention.replace(names.key, ShortProjection(getattr(attention, names.key), bases))
        keys = ranks if folds else {}
        sides = {
            names.query: [keys.get(head // plan.group, size) for head in plan.own],
            names.key: [keys.get(group, size) for group in plan.own_groups],
            names.value: [values.get(group, size) for group in groups],
        }
        if names.fused:
            query, key, value = sides.values()
            if names.fused_order == "groups" and len(plan.own) == plan.heads:
                rows = zip(zip(*[iter(query)] * plan.group, strict=True), key, value, strict=True)
                sides = {names.fused: [width for part, *rest in rows for width in (*part, *rest)]}
            else:
                sides = {names.fused: [*query, *key, *value]}
        for name, widths in sides.items():
            if any(width < size for width in widths):
                attention.replace(name, Filled(getattr(attention, name), widths, size, names.transposed))
        if values:
            widths = [values.get(head // plan.group, size) for head in range(plan.heads)]
            attention.replace(names.output, Cut(getattr(attention, names.output), widths, size, names.transposed))

    def codec(self, attention, exchange, own, held):
        return Codec(attention.low_rank, exchange, own, held)

    def attend(self, call, query, key, value, mask, then):
        """What comes next gets heads as narrow as the widest of them. What was not cached, so that nothing has reduced
        it, is reduced here."""
        attention = call.attention
        bases, group, size = attention.low_rank, attention.plan.group, attention.size
        own, held = (tuple(sorted({head // group for head in heads})) for heads in (call.own, call.heads))
        if key is not None and bases.ranks:
            # Told by the cache, and taken back: a checkpointed layer that is computed again has to do the same again.
            if bases.encoder is not None and not call.exchange.notes.pop(bases.coded, False):
                key = Codec(bases, call.exchange, own, held).reduced(key)
                del call.exchange.notes[bases.coded]
            if not bases.expands:
                if bases.encoder is not None:
                    query = bases.asked(query, call.own)
                # Others may lend what they get, to layers with wide heads; a kernel must be told how it scales; and the
                # pages of an engine are as wide as the base's heads.
                narrow = attention.plan.treatments[-1] is self and call.arguments.get("scaling") is not None
                narrow = narrow and call.implementation != "vllm"
                width = max(bases.ranks.get(number, size) for number in own) if narrow else size
                query, key = _to(query, width), _to(key, width)
        width = max(bases.values.get(number, size) for number in held)
        output, weights = then(query, key, value[..., :width], mask)
        return _to(output, size), weights


def _to(states, width):
    """Heads cut, or filled up, to this width."""
    missing = width - states.shape[-1]
    return nn.functional.pad(states, (0, missing)) if missing > 0 else states[..., :width]


def is_linear(names):
    """Whether queries and keys are what projections make of states: then narrow projections make narrow ones."""
    return not (names.query_norm or names.key_norm or names.value_limit or names.gate)


def is_short(names):
    """Whether the projection of keys in a checkpoint has as many rows as numbers are cached: if it alone makes keys."""
    return not (names.fused or names.transposed or names.key_norm or names.value_limit)


class Filled(nn.Module):
    """A projection to heads of these widths, filled up with zeros: (B, T, input) -> (B, T, heads * D)."""

    def __init__(self, projection, widths, size, transposed):
        super().__init__()
        self.runs, self.size = [(width, len(list(some))) for width, some in groupby(widths)], size
        weight = projection.weight
        self.down = linear(projection, weight.shape[0 if transposed else 1], sum(widths))

    def forward(self, states):
        parts = self.down(states).split([width * count for width, count in self.runs], dim=-1)
        heads = (part.unflatten(-1, (-1, width)) for part, (width, _) in zip(parts, self.runs, strict=True))
        return torch.cat([_to(part, self.size) for part in heads], dim=-2).flatten(-2)


class Cut(nn.Module):
    """A projection of heads, of which only the first numbers count: (B, T, heads * D) -> (B, T, output)."""

    def __init__(self, projection, widths, size, transposed):
        super().__init__()
        self.runs, self.size = [(width, len(list(some))) for width, some in groupby(widths)], size
        weight = projection.weight
        self.up = linear(projection, sum(widths), weight.shape[1 if transposed else 0])

    def forward(self, states):
        parts = states.unflatten(-1, (-1, self.size)).split([count for _, count in self.runs], dim=-2)
        cut = [part[..., :width].flatten(-2) for part, (width, _) in zip(parts, self.runs, strict=True)]
        return self.up(torch.cat(cut, dim=-1))


def linear(like, inputs, outputs):
    """A linear module of this shape, with a bias if `like` has one."""
    weight, bias = like.weight, getattr(like, "bias", None)
    made = nn.Linear(inputs, outputs, bias=bias is not None, dtype=weight.dtype, device=weight.device)
    return made.requires_grad_(weight.requires_grad)


class Packing:
    """How heads of these widths lie in a cache: side by side as one, unless all are alike."""

    def __init__(self, widths):
        self.widths, self.width, self.even = list(widths), max(widths, default=0), len(set(widths)) < 2

    def packed(self, states):
        """(B, heads, T, D) -> (B, 1, T, W), or (B, heads, T, width)."""
        if self.even:
            return states[..., : self.width]
        parts = [states[:, at, :, :width] for at, width in enumerate(self.widths)]
        return torch.cat(parts, dim=-1)[:, None]

    def unpacked(self, slot):
        """(B, heads, S, width), as wide as the widest."""
        if self.even:
            return slot
        return torch.stack([_to(part, self.width) for part in slot[:, 0].split(self.widths, dim=-1)], dim=1)


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
    """The ranks of the treated groups of one layer, and bases of keys that are no part of projections.

    ranks, values: of keys and of values, by KV group. expands: keys are turned by position, so they are made again in
    full from what is cached. basis: (sum of ranks, D), the rows of a group are orthonormal. offset: (treated groups,
    D), of keys that are expanded. encoder: (sum of ranks, D), or None if the projection of keys is narrow.
    """

    def __init__(self, plan, ranks, values, size):
        super().__init__()
        self.ranks, self.values, self.size, self.group = ranks, values, size, plan.group
        self.coded, self.expands, self.turner = ("coded", plan.place), False, None
        self.layout = Layout(plan.own_groups, ranks, size) if ranks else None
        for name in ("basis", "offset", "encoder"):
            self.register_parameter(name, None)

    def make(self, like, expands, encodes):
        """Parameters that the checkpoint fills. like: a weight."""
        total, self.expands = sum(self.ranks.values()), expands
        shapes = {"basis": (total, self.size)}
        shapes |= {"offset": (len(self.ranks), self.size)} if expands else {}
        shapes |= {"encoder": (total, self.size)} if encodes else {}
        for name, shape in shapes.items():
            made = torch.zeros(shape, dtype=like.dtype, device=like.device)
            setattr(self, name, nn.Parameter(made, like.requires_grad))

    def codes(self, keys):
        """(B, treated groups, T, D), not turned -> for each of them (B, T, r)"""
        matrix = self.basis if self.encoder is None else self.encoder
        keys = keys - self.offset[:, None].to(keys.dtype) if self.encoder is None else keys
        rows = matrix.to(keys.dtype).split(list(self.ranks.values()))
        return [keys[:, at] @ part.T for at, part in enumerate(rows)]

    def asked(self, query, heads):
        """Queries (B, heads, T, D) of keys that are not expanded: of treated groups (B, heads, T, r), filled up."""
        rows = dict(zip(self.ranks, self.basis.split(list(self.ranks.values())), strict=True))
        numbers = [head // self.group for head in heads]
        parts = [query[:, at : at + 1] for at in range(len(numbers))]
        made = [
            _to(part @ rows[number].T, self.size) if number in rows else part
            for part, number in zip(parts, numbers, strict=True)
        ]
        return torch.cat(made, dim=1)

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
        self.down = linear(projection, projection.weight.shape[1], bases.layout.width)
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
    return rule != "none" and not getattr(getattr(attention, "config", None), "alibi", False)


class Codec:
    """What of a layer's keys and values is cached in one pass, and these again; see `CacheView` in the file beside.
    own: the KV groups that have these keys, all of low-rank keys among them; held: those that have these values; others
    may be cached elsewhere."""

    def __init__(self, bases, exchange, own, held):
        self.bases, self.exchange = bases, exchange
        self.layout = Layout(own, bases.ranks, bases.size) if bases.ranks and own else None
        self.narrow = Packing([bases.ranks.get(group, bases.size) for group in own])
        self.values = Packing([bases.values.get(group, bases.size) for group in held])

    def codes(self, keys):
        """Keys (B, own groups, T, D) of new tokens, as a kernel gets them -> for each treated group (B, T, r)."""
        bases = self.bases
        keys = keys[:, self.layout.treated].float()
        return bases.codes(bases.turner.turn(keys, self.turns(keys), back=True) if bases.expands else keys)

    def keys(self, codes, full, turns):
        """What `codes` were made of, and the keys of the full groups (B, ., S, D): (B, own groups, S, D)."""
        return self.layout.joined(full, self.bases.turner.turn(self.bases.expanded(codes), turns))

    def reduced(self, keys):
        """Keys of new tokens as they would come out of a cache, but as wide as they were."""
        bases, self.tokens = self.bases, keys.shape[-2]
        if bases.encoder is None:
            return keys
        self.exchange.notes[bases.coded] = True
        codes, full = self.codes(keys), keys[:, self.layout.whole]
        if bases.expands:
            return self.keys(torch.cat(codes, dim=-1).to(keys.dtype), full, self.turns(keys))
        treated = torch.stack([_to(part, bases.size) for part in codes], dim=1)
        return self.layout.joined(full, treated.to(keys.dtype))

    def encode(self, keys, values):
        """Keys (B, own groups, T, D), or None, and values (B, held groups, T, D), as they are cached."""
        self.tokens = values.shape[-2]
        if self.bases.expands and keys is not None:
            full = keys[:, self.layout.whole].transpose(1, 2).flatten(2)
            keys = torch.cat([full, *(part.to(keys.dtype) for part in self.codes(keys))], dim=-1)[:, None]
            self.exchange.notes[self.bases.coded] = True
        elif keys is not None:
            keys = self.narrow.packed(self.reduced(keys))
        return keys, self.values.packed(values)

    def decode(self, keys, values):
        """What was cached -> keys (B, own groups, S, .), and values (B, held groups, S, .)."""
        if self.bases.expands and keys is not None:
            slot, numbers = keys[:, 0], self.layout.numbers
            full = slot[..., :numbers].unflatten(-1, (-1, self.bases.size)).transpose(1, 2) if numbers else None
            keys = self.keys(slot[..., numbers:], full, self.turns(keys, keys.shape[-2]))
        elif keys is not None:
            keys = self.narrow.unpacked(keys)
        return keys, self.values.unpacked(values)

    def turns(self, like, slots=None):
        """Cosines and sines, (B or 1, ., width) each, of the new tokens in `like` (., ., T, .), or of that many slots;
        None if the layer does not turn keys. They are made once a pass for all layers of a kind."""
        turner, notes = self.bases.turner, self.exchange.notes
        if not turner.rotates:
            return None
        number = slots if slots is None or isinstance(slots, int) else str(slots)  # of an export, by name
        name = ("turns", turner.kind, number, like.dtype, like.device)
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
