"""Windows: a KV group sees the first tokens of its row (sinks) and the most recent ones, at their true positions.

The query at place i of its row (padding counts) sees the key at place j <= i if that is a real token, and either
i - j < W, or fewer than S real tokens come before it; and only if the family's own mask lets it. Long texts are
computed in blocks of queries, whose keys are the sinks, the window and the block: nothing of T x S numbers is made.

In a cache a window keeps S + W tokens, and `MARGIN` more that come back if the last tokens are taken back. They lie in
slots, and a new token takes the slot of the oldest, so that no step copies the others:

    slots   0 ... S - 1    S ... S + W - 1                  S + W ... S + W + margin - 1
    hold    the sinks      place p >= S, in S + (p - S) % W  p after it has left the window, in S + W + p % margin

While a text is no longer than S + W, a window changes nothing: the layer of the cache holds its KV groups as ever.

Letters in shape comments are those of `modeling_shared_attention`; n KV groups have one window, N keys are new or were
taken from the layer of the cache, R queries are in a block, and E keys in its reach.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

MARGIN = 32
"""Tokens that can be taken back at any time."""

DRAFT = 128
"""All tokens of the last pass can be, if they are no more than this: assisted generation verifies so many at once."""

BLOCK = 128
"""Queries in a block on a CPU: a block reads keys that not all of its queries see. Elsewhere more, for fewer calls."""


class Window:
    """Windows in one stack. stack: see `modeling_shared_attention`."""

    def __init__(self, stack):
        self.layers = {
            layer: {group: (int(told["sinks"]), int(told["tokens"])) for group, told in groups.items()}
            for layer, groups in stack.layers.items()
        }
        self.shapes, self.steps = stack.shapes, {}
        for layer, groups in self.layers.items():
            heads, size, _ = self.shapes[layer]
            for group in groups:
                if not 0 <= group * size < heads:
                    raise ValueError(
                        f"shared_attention: layer {layer} has a window for KV group {group}, the model has "
                        f"{heads // size} groups."
                    )

    def touches(self, layer):
        return layer in self.layers

    def own_heads(self, layer):
        return range(self.shapes[layer][0])

    def takes(self, layer):
        return tuple(self.layers[layer])

    def untouched(self, layer, seen=0):
        """Tokens up to which nothing changes in a layer that has seen so many."""
        return min((until for until in map(sum, self.layers[layer].values()) if until >= seen), default=1 << 62)

    def unserved(self):
        """Why an attention layer that pages all KV groups alike does not do, or None."""
        return f"layer {min(self.layers)} has windows of its KV groups, and vLLM has one window for a layer"

    def outgrown(self, layer, total, limit):
        """KV groups that a layer of a cache does not hold itself once it has seen so many tokens; None: there is no
        telling. limit: the tokens that it holds at the most, or None."""
        return [
            group
            for group, (sinks, tokens) in self.layers.get(layer, {}).items()
            if (total is None or total > sinks + tokens) and (limit is None or limit > tokens)
        ]

    def passed_by(self, call, mask, cached):
        """A pass in which nothing is different: what later ones have to know of it is which tokens are padding."""
        state, start, tokens = cached.layer.parts.get("window"), cached.start, cached.plain
        real = real_tokens(call, mask, start, cached.offset, tokens)
        if state or real is not None:
            state = state or WindowParts(len(cached.values), False)
            state.see(real, start, tokens, cached.values)
            cached.layer.parts = {**cached.layer.parts, "window": state}

    def attend(self, call, query, key, value, mask, then):
        """Windowed KV groups by their windows, the others by what comes next. mask: for all heads alike, or by head."""
        if call.exchange.masked:
            return self._masked(call, query, key, value, mask, then)
        _refuse_packed(call, mask, value)
        cached, windows, size = call.cached, self.layers[call.layer], self.shapes[call.layer][1]
        every, tokens = range(len(call.view.heads) // size), value.shape[-2]
        if cached is not None and tokens == 1 and mask is None and call.implementation == "sdpa":
            state, step = cached.layer.parts.get("window"), self._step_of(call, cached.held)
            if step is not None and state is not None and not cached.taken and step.fits(state):
                return step.attend(call, query, key, value, state)
        own = sorted({head // size for head in call.view.own})
        if cached is None:
            start, offset, state, keys, values = 0, 0, None, (own, key), (every, value)
            short = [group for group in windows if tokens <= sum(windows[group])]
        else:
            start, offset = cached.start, cached.offset
            held = [group for group in every if call.view.heads[group * size] // size in cached.held]
            keys, values = ([group for group in own if group in held], cached.keys), (held, cached.values)
            state = cached.layer.parts.get("window") or WindowParts(value.shape[0], cached.layer.static)
            cached.layer.parts = {**cached.layer.parts, "window": state}
            short = [group for group in windows if group in held]
        real = real_tokens(call, mask, start, offset, tokens) if state or len(short) < len(windows) else None
        if state and (short or cached.taken):
            state.see(real, start, tokens, value)
        last = call.attention.plan.treatments[-1] is self
        left = [group for group in every if group not in windows]
        runs = [(left, then)] if left and not (last and short) else []
        if short:  # windows that change nothing yet
            runs.append((sorted([*left, *short]) if last else short, None))
        pieces = []
        for groups, run in runs:
            heads, places, rest = _heads(groups, size), _own(call, groups, size), [g for g in own if g in groups]
            run = run or call.only(places).kernel
            given = [None, None] if not rest else [call.pick(query, places), _of(call, keys, rest)]
            pieces.append((groups, run(*given, _of(call, values, groups), _by_head(call, mask, heads))))
        numbers = {group: call.view.heads[group * size] // size for group in windows}
        kinds = {group: (*window, call.value_size(numbers[group])) for group, window in windows.items()}
        for window in dict.fromkeys(kinds.values()):
            groups = [group for group in windows if kinds[group] == window and group not in short]
            if groups:
                places, old = _own(call, groups, size), state and state.kept.get(window)
                values_of = _of(call, (every, value), groups)[..., : window[2]]
                given = call.pick(query, places), _of(call, (own, key), groups), values_of
                if cached is not None and numbers[groups[0]] in cached.taken:
                    past = [cached.taken[numbers[group]] for group in groups]
                    before = [torch.cat(states, dim=1) for states in zip(*past, strict=True)]
                    given = given[0], *(torch.cat(pair, dim=2) for pair in zip(before, given[1:], strict=True))
                static, seen = state is not None and state.static, _by_head(call, mask, _heads(groups, size))
                run = WindowPass(call.only(places), *window[:2], start, offset, tokens, seen, static)
                those = state.real if state and given[1].shape[2] > tokens else real
                found, kept = run.attend(*given, those, old)
                pieces.append((groups, found))
                if state:
                    state.kept = {**state.kept, window: kept}
        if state and not short:
            state.real = None
        return _joined(pieces, size, value.shape[-1])

    def _step_of(self, call, held):
        """How one token is computed if the layer of the cache holds these KV groups; None: not in the short way."""
        view, layer = call.view, call.layer
        if (layer, held) not in self.steps:
            attention, (_, group, size) = call.attention, self.shapes[layer]
            alone = len(attention.plan.treatments) == 1 and not attention.names.sinks
            windows = {number: (*window, size) for number, window in self.layers[layer].items()}
            self.steps[layer, held] = OneToken(windows, view.heads, group, held) if alone else None
        return self.steps[layer, held]

    def _masked(self, call, query, key, value, mask, then):
        """Everything is cached, and windows are narrower masks that save nothing: in continuous batching, where one row
        holds the tokens of many texts and pages all that were before them, and in an exported graph, which is one for
        all lengths. Raises NotImplementedError for a kernel that is given no mask."""
        windows, size = self.layers[call.layer], self.shapes[call.layer][1]
        if not isinstance(mask, torch.Tensor):
            raise NotImplementedError(
                f"shared_attention: layer {call.layer} has windows, which need a mask in continuous batching and when "
                "a model is exported: choose attn_implementation='sdpa' or 'eager' for it."
            )
        every = range(len(call.view.heads) // size)
        own, pieces = sorted({head // size for head in call.view.own}), []
        for window in (None, *dict.fromkeys(windows.values())):
            groups = [group for group in every if windows.get(group) == window]
            if groups:
                places, rest = _own(call, groups, size), [group for group in own if group in groups]
                given = (call.pick(query, places), _of(call, (own, key), rest)) if rest else (None, None)
                run = then if window is None else call.only(places).kernel
                seen = mask if window is None else narrowed(call, mask, *window)
                seen = _by_head(call, seen, _heads(groups, size))
                pieces.append((groups, run(*given, _of(call, (every, value), groups), seen)))
        return _joined(pieces, size, value.shape[-1])


class OneToken:
    """One token, nothing of which is padding, of a layer some of whose windows are outgrown: what general code finds
    out anew for every pass is known. windows: by KV group, sinks, tokens and size of a head. pieces: (window, KV
    groups, their heads), window None: as the cache holds them."""

    def __init__(self, windows, heads, size, held):
        groups = range(len(heads) // size)
        of = {group: None if heads[group * size] // size in held else windows[group] for group in groups}
        together = {window: tuple(group for group in groups if of[group] == window) for window in of.values()}
        self.pieces = [(window, some, tuple(_heads(some, size))) for window, some in together.items()]
        self.windows = [window for window in together if window is not None]
        every = sorted((head, at, place) for at, piece in enumerate(self.pieces) for place, head in enumerate(piece[2]))
        self.order = []  # [piece, first of its heads, how many], in the order of heads
        for _, at, place in every:
            if self.order and self.order[-1][0] == at and sum(self.order[-1][1:]) == place:
                self.order[-1][2] += 1
            else:
                self.order.append([at, place, 1])

    def fits(self, state):
        """Whether windows are kept, and rows do not differ."""
        kept = [state.kept.get(window) for window in self.windows]
        return not state.static and state.real is None and all(one is not None and one.places is None for one in kept)

    def attend(self, call, query, key, value, state):
        outputs, cached, kept = [], call.cached, dict(state.kept)
        for window, groups, heads in self.pieces:
            keys, values = cached.keys, cached.values
            if window is not None:
                one = kept[window] = kept[window].step(call.pick(key, groups), call.pick(value, groups), None)
                begin = min(cached.offset, one.sinks)
                count = min(one.sinks + one.window, one.length) - begin
                keys, values = one.keys.narrow(2, begin, count), one.values.narrow(2, begin, count)
            outputs.append(call.kernel(call.pick(query, heads), keys, values, None)[0])
        state.kept = kept
        if len(outputs) == 1:
            return outputs[0], None
        return torch.cat([outputs[at].narrow(2, start, count) for at, start, count in self.order], dim=2), None


def narrowed(call, mask, sinks, tokens):
    """A mask (1 or B, ., T, S) without what a window does not see. The keys of each text lie one after the other, so
    those that a query may see tell how far back each is. It is made once a pass."""
    exchange, name = call.exchange, ("narrowed", id(mask), sinks, tokens)
    if name not in exchange.notes:
        seen = _lets(mask)
        ago = seen.sum(-1, keepdim=True) - seen.cumsum(-1)
        told = exchange.given.get("position_ids")
        if told is None and call.arguments.get("sliding_window") is not None:  # the family's window has lost some
            told = (torch.arange(mask.shape[-2], device=mask.device) + exchange.past)[None]
        last = seen.sum(-1, keepdim=True) - 1 if told is None else told.to(mask.device)[:, None, :, None]
        kept = seen & ((ago < tokens) | (last - ago < sinks))
        made = kept if mask.dtype == torch.bool else mask.masked_fill(~kept, torch.finfo(mask.dtype).min)
        exchange.notes[name] = mask, made  # the mask is kept, so that no other has its id
    return exchange.notes[name][1]


def _refuse_packed(call, mask, value):
    """Flash attention is told by positions which sequences lie in one row, one behind the other, and not by a mask: no
    other kernel would keep them apart. value: (1 or B, G, T, D)."""
    if mask is not None or not call.implementation.startswith("flash") or value.shape[-2] == 1:
        return
    positions, packed = call.arguments.get("position_ids"), call.arguments.get("cu_seq_lens_q") is not None
    if positions is not None and not packed and value.shape[0] == 1 and not torch.compiler.is_compiling():
        known = call.exchange.notes.get(("packed", id(positions)))
        packed = bool((positions.diff(dim=-1) < 0).any()) if known is None else known[1]
        call.exchange.notes["packed", id(positions)] = positions, packed
    if packed:
        raise ValueError(
            "shared_attention: several sequences are packed into one row, which KV groups with windows cannot tell "
            f"apart under {call.implementation}: give each sequence a row and pad it, or choose "
            "attn_implementation='sdpa'."
        )


def _heads(groups, size):
    return [head for group in groups for head in range(group * size, (group + 1) * size)]


def _own(call, groups, size):
    """Where the view's own heads have those of these KV groups."""
    return [place for place, head in enumerate(call.view.own) if head // size in groups]


def _of(call, held, groups):
    """Of states of some KV groups, those of these; held: the groups, and their states (B, ., S, D)."""
    among, states = list(held[0]), held[1]
    return call.pick(states, [among.index(group) for group in groups])


def _by_head(call, mask, heads):
    return call.pick(mask, heads) if getattr(mask, "ndim", 0) == 4 and mask.shape[1] > 1 else mask


def _joined(pieces, size, width):
    """Outputs (B, T, H, D) and probabilities (B, H, T, S) of KV groups, together, in the order of their heads. width:
    D, for outputs that are narrower are filled up."""
    if any(output.shape[-1] < width for _, (output, _) in pieces):
        pad = torch.nn.functional.pad
        pieces = [(groups, (pad(made, (0, width - made.shape[-1])), weights)) for groups, (made, weights) in pieces]
    if len(pieces) == 1:
        return pieces[0][1]
    order = sorted(
        (group, number, place) for number, piece in enumerate(pieces) for place, group in enumerate(piece[0])
    )
    outputs = [pieces[number][1][0][:, :, place * size : (place + 1) * size] for _, number, place in order]
    if any(found[1] is None for _, found in pieces):
        return torch.cat(outputs, dim=2), None
    weights = [pieces[number][1][1][:, place * size : (place + 1) * size] for _, number, place in order]
    return torch.cat(outputs, dim=2), torch.cat(weights, dim=1)


def real_tokens(call, mask, start, offset, tokens):
    """Which of the new tokens are real, (1 or B, T), or None if all are: a real token sees itself."""
    if mask is None:
        return None
    compiling = torch.compiler.is_compiling()
    known = None if compiling else call.exchange.notes.get(("real", id(mask)))
    if known is not None:
        return known[1]
    if not isinstance(mask, torch.Tensor):  # of flex attention
        device = mask.kv_num_blocks.device
        places = torch.arange(tokens, device=device)
        real = mask.mask_mod(torch.arange(mask.shape[0], device=device)[:, None], 0, places, start - offset + places)
        real = real.expand(mask.shape[0], tokens)
    elif mask.ndim == 2:  # of flash attention
        real = mask[:, -tokens:].bool()
    else:
        places = torch.arange(tokens, device=mask.device) + (start - offset)
        rows = mask[:, 0].expand(-1, tokens, -1)
        real = _lets(rows.gather(-1, places.view(1, -1, 1).expand(rows.shape[0], -1, 1))[..., 0])
    if not compiling:
        real = None if bool(real.all()) else real
        call.exchange.notes["real", id(mask)] = mask, real
    return real


def _lets(mask):
    """Whether a mask, boolean or added to scores, lets keys be seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


class WindowParts:
    """What windows keep in a layer of a cache. real: which tokens so far are real (B, S), as long as a window waits to
    be kept, or None if all are. kept: by sinks, tokens and size of
    values, its `Kept`."""

    def __init__(self, batch, static, real=None, kept=None):
        self.batch, self.static, self.real, self.kept = batch, static, real, kept or {}

    def see(self, real, start, tokens, like):
        if self.static or (real is None and self.real is None):
            return
        every = like.new_ones(self.batch, start + tokens, dtype=torch.bool)
        if self.real is not None:
            every[:, :start] = self.real[:, :start]
        if real is not None:
            every[:, start:] = real
        self.real = every

    def rows(self, index):
        def chosen(states):
            return states if states is None else states.clone() if index is None else states[index.to(states.device)]

        kept = {window: one.changed(chosen) for window, one in self.kept.items()}
        return WindowParts(self.batch if index is None else len(index), self.static, chosen(self.real), kept)

    def crop(self, removed):
        real = self.real if self.real is None or not removed else self.real[:, :-removed]
        kept = {window: one.cropped(removed) for window, one in self.kept.items()} if removed else self.kept
        return WindowParts(self.batch, self.static, real, kept)

    def reset(self):
        for one in self.kept.values():
            one.places.fill_(-1)
            one.length.zero_()
            one.settled = False

    @property
    def nbytes(self):
        return sum(one.nbytes for one in self.kept.values())


def places_in(sinks, window, margin, total, device):
    """The place of the token in each slot but those of sinks, after `total` tokens; below the sinks': none is there."""
    ring, log = torch.arange(window, device=device), torch.arange(margin, device=device)
    ring = total - 1 - (total - 1 - sinks - ring) % window
    return torch.cat([ring, total - window - 1 - (total - window - 1 - log) % margin]) if margin else ring


@dataclass
class Kept:
    """Keys and values (B, n, slots, D) of one window in a cache, as in the drawing at the top. places: (B, slots), the
    place of the token in each slot, -1: none that is real; or None if all were real, and slots follow from the length.
    length: tokens so far; in a static cache a tensor. lost: what `gone` was when slots were last laid anew.
    settled: whether every row has all of its sinks."""

    sinks: int
    window: int
    margin: int
    keys: Any
    values: Any
    places: Any
    length: Any
    lost: int
    settled: bool

    @property
    def gone(self):
        """Older tokens than this place are gone, but for sinks. It follows from the length, for a number that began to
        change after many steps would make torch.compile begin anew."""
        return max(self.lost, self.length - self.window - self.margin)

    def changed(self, change):
        """With another batch."""
        length = self.length.clone() if isinstance(self.length, torch.Tensor) else self.length
        keys, values, places = change(self.keys), change(self.values), change(self.places)
        return replace(self, keys=keys, values=values, places=places, length=length)

    def now(self):
        """The place in every slot of sinks and window, (1 or B, slots)."""
        if self.places is not None:
            return self.places[:, : self.sinks + self.window]
        ring = places_in(self.sinks, self.window, 0, self.length, self.keys.device)
        sinks = torch.arange(self.sinks, device=ring.device)
        ring = torch.where(ring < self.sinks, -1, ring)
        return torch.cat([torch.where(sinks < self.length, sinks, -1), ring])[None]

    def told(self):
        """With places, if padding has come."""
        if self.places is not None:
            return self
        log = places_in(self.sinks, self.window, self.margin, self.length, self.keys.device)[self.window :]
        places = torch.cat([self.now(), log[None]], dim=1).expand(self.keys.shape[0], -1).clone()
        return replace(self, places=places, settled=bool((places[:, : self.sinks] >= 0).all()))

    def step(self, key, value, real):
        """Take in one token, (B, n, 1, D); real: (1 or B, 1), or None. In place, if nobody needs what was before."""
        one = self if real is None else self.told()
        static = isinstance(one.length, torch.Tensor)
        needed = torch.is_grad_enabled() or torch.compiler.is_compiling()  # a graph cannot ask for inference mode
        if not static and (needed or one.keys.is_inference() > key.is_inference()):
            one = one.changed(lambda states: None if states is None else states.clone())
        place, first = one.length, one.sinks
        if one.places is None:
            slot = place if place < first else first + (place - first) % one.window
            gone = place - one.window
            for states, new in ((one.keys, key), (one.values, value)):
                last = states.select(2, slot)
                if gone >= first and one.margin:
                    states.select(2, first + one.window + gone % one.margin).copy_(last)
                last.copy_(new.select(2, 0))
        else:
            one._step_of_rows(key, value, key.new_ones(1, 1, dtype=torch.bool) if real is None else real)
        if static:
            one.length.add_(1)
        else:
            one.length = place + 1
        return one

    def _step_of_rows(self, key, value, real):
        """As `step`, if the rows of the batch differ in what is a sink."""
        place, first, sink = self.length, self.sinks, torch.zeros_like(real)
        if first and not self.settled:
            rank = (self.places[:, :first] >= 0).sum(1, keepdim=True)  # (B, 1)
            sink = real & (rank < first)
            here = sink & (torch.arange(first, device=rank.device) == rank)  # (B, S)
            for states, new in ((self.keys, key), (self.values, value)):
                states[:, :, :first] = torch.where(here[:, None, :, None], new, states[:, :, :first])
            self.places[:, :first] = torch.where(here, place, self.places[:, :first])
        slot = torch.as_tensor(first + (place - first) % self.window, device=key.device).view(1)
        gone = torch.as_tensor(place - self.window, device=key.device).view(1)
        where = torch.where(real & ~sink, place, -1).expand(self.keys.shape[0], -1)
        for states, axis, new in ((self.keys, 2, key), (self.values, 2, value), (self.places, 1, where)):
            if self.margin:
                states.index_copy_(axis, first + self.window + gone % self.margin, states.index_select(axis, slot))
            states.index_copy_(axis, slot, new.to(states.dtype))
        if not self.settled and not torch.compiler.is_compiling():
            self.settled = bool((self.places[:, :first] >= 0).all())

    def fixed(self, old):
        """The same in a static cache, whose tensors keep their addresses: those of `old`, if there is one."""
        if old is None:
            length = torch.as_tensor(self.length, device=self.keys.device)
            old = replace(self, keys=self.keys.clone(), values=self.values.clone(), length=length.clone())
            for states in (old.keys, old.values, old.places, old.length):
                if not torch.compiler.is_compiling():
                    torch._dynamo.mark_static_address(states)
            return old
        for mine, new in ((old.keys, self.keys), (old.values, self.values), (old.places, self.places)):
            mine.copy_(new)
        old.length.copy_(torch.as_tensor(self.length))
        old.settled = self.settled
        return old

    def cropped(self, removed):
        """Without the last tokens. Raises ValueError if the window before them is not kept."""
        left, first, static = int(self.length) - removed, self.sinks, isinstance(self.length, torch.Tensor)
        lost = max(first, int(self.length) - self.window) if static else self.gone
        if max(first, left - self.window) < lost:
            raise ValueError(
                f"shared_attention: {removed} of {int(self.length)} tokens cannot be taken back: before "
                f"its window of {self.window} it keeps no more than {self.margin}. Compute the text again."
            )
        places = places_in(first, self.window, 0, left, self.keys.device)
        index = torch.where(
            places < int(self.length) - self.window,
            first + self.window + places % max(self.margin, 1),
            first + (places - first) % self.window,
        )
        index = torch.cat([torch.arange(first, device=index.device), index.clamp(max=self.keys.shape[2] - 1)])
        index = torch.cat([index, torch.arange(first + self.window, self.keys.shape[2], device=index.device)])
        one = self.changed(lambda states: states)
        one.keys, one.values, one.length, one.lost = self.keys[:, :, index], self.values[:, :, index], left, lost
        if static:
            one.length = torch.as_tensor(left, device=index.device)
        if self.places is not None:
            kept = self.places[:, index]
            one.places, one.settled = torch.where(kept < left, kept, -1), False
            one.places[:, first : first + self.window][:, places < first] = -1
        return one

    @property
    def nbytes(self):
        used = self.sinks + self.window if self.places is not None else min(self.sinks + self.window, self.length)
        return sum(states[:, :, :used].nbytes for states in (self.keys, self.values))


@dataclass
class WindowPass:
    """One pass of the KV groups of one window. mask: of their heads. offset: the place of the mask's first column."""

    call: Any
    sinks: int
    window: int
    start: Any
    offset: int
    tokens: int
    mask: Any
    static: bool

    def attend(self, query, key, value, real, old):
        """query: (B, h, T, D). key, value: (B, n, N, D), the last T of them new. real: which of them are, (1 or B, N),
        or None. old: the `Kept` before, or None. Returns output and probabilities, and the `Kept` afterwards."""
        if old is not None and query.shape[2] == 1:
            kept = old.step(key, value, real)
            return self.one(query, kept), kept
        return self.blocks(query, key, value, real, old)

    def one(self, query, kept):
        """The last token, which is in its slot."""
        if kept.places is None and self.mask is None:
            stop = min(kept.sinks + kept.window, kept.length)
            begin = min(self.offset, kept.sinks)  # sinks that the family's own window has lost
            return self.kernel(query, kept.keys[:, :, begin:stop], kept.values[:, :, begin:stop], None, None)
        stop, places = kept.sinks + kept.window, kept.now()
        mask = self.additive(query, 0, 1, places, kept.sinks)
        return self.kernel(query, kept.keys[:, :, :stop], kept.values[:, :, :stop], mask, places)

    def blocks(self, query, key, value, real, old):
        """Queries in blocks, each over the sinks, what of the window was kept before, and the new keys in its reach."""
        tokens, count, start, back = query.shape[2], key.shape[2], self.start, self.window - 1
        compiled = isinstance(start, torch.Tensor)
        first = start + tokens - count  # the place of the first key that is given
        if self.static or real is not None or (old is not None and old.places is not None):
            old = old and old.told()
            sinks, places = self._sinks_of_rows(key, value, real, old, first)
        else:
            sinks, places = self._sinks(key, value, old, first), None
        every = torch.arange(count, device=key.device)[None] + first if places is None else places
        size = tokens if compiled else BLOCK if query.device.type == "cpu" else max(2 * BLOCK, self.window // 2)
        alike = places is None and old is None and self.mask is None and self.offset <= 0 and not compiled
        plain = self.sinks + self.window if alike and not first and self.causal() else 0
        end, outputs, weights = 0, [], []
        while end < tokens:
            begin, end = end, min(max(end + size, plain), tokens)
            low, high = (0, count) if compiled else (max(first, start + begin - back) - first, start + end - first)
            if places is None:
                low = max(low, self.sinks - first, 0)
            keys, values, where = [sinks[0]], [sinks[1]], [sinks[2]]
            if old is not None and (compiled or start + begin - back < first):
                stop = self.sinks + self.window
                keys.append(old.keys[:, :, self.sinks : stop])
                values.append(old.values[:, :, self.sinks : stop])
                where.append(old.now()[:, self.sinks :])
            if low < high:
                keys, values = [*keys, key[:, :, low:high]], [*values, value[:, :, low:high]]
                where.append(every[:, low:high])
            where = _rows(where)
            if len(keys) == 2 and places is None and old is None and first + low == sinks[0].shape[2]:
                keys, values = [key[:, :, :high]], [value[:, :, :high]]  # the sinks lie before these
            keys, values = (states[0] if len(states) == 1 else torch.cat(states, dim=2) for states in (keys, values))
            rows = query if size >= tokens else query[:, :, begin:end]
            if end <= plain:  # nothing has left the window
                mask = None
            elif alike:
                apart = start + begin - (first + low if low < high else 0)
                mask = self.band(query, begin, end, where, sinks[0].shape[2], apart)
            else:
                mask = self.additive(query, begin, end, where, sinks[0].shape[2])
            output, made = self.kernel(rows, keys, values, mask, where)
            outputs.append(output)
            weights.append(made)
        made = None if weights[0] is None else torch.cat(weights, dim=2)
        found = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), made
        if self.call.cached is None:
            return found, None
        return found, self._kept(key, value, places, sinks, old, first)

    def _sinks(self, key, value, old, first):
        """Keys and values of the sinks (B, n, S, D), fewer if there are not so many, and their places (1, S)."""
        count, held = min(self.sinks, first + key.shape[2]), min(self.sinks, first)
        pairs = []
        for number, new in enumerate((key, value)):
            if not first:
                pairs.append(new[:, :, :count])
            elif old is None:  # the family's own window has lost some, which nothing will see
                pairs.append(new.index_select(2, (torch.arange(count, device=new.device) - first).clamp(min=0)))
            else:
                before = (old.keys, old.values)[number][:, :, :held]
                pairs.append(before if held == count else torch.cat([before, new[:, :, : count - held]], dim=2))
        return *pairs, torch.arange(count, device=key.device)[None]

    def _sinks_of_rows(self, key, value, real, old, first):
        """The same, of rows that differ: sinks, with places (B, S), -1 if a row has not so many; and the places (B, N)
        of the keys given, -1 for those that are sinks or not real."""
        (batch, _, count, _), device = key.shape, key.device
        real = torch.ones(1, 1, dtype=torch.bool, device=device) if real is None else real
        real = real.expand(batch, max(count, real.shape[1]))
        ranks = real.cumsum(1)[:, -count:] - 1
        real = real[:, -count:]
        if old is not None:
            ranks = ranks + (old.places[:, : self.sinks] >= 0).sum(1, keepdim=True)
        sink = real & (ranks < self.sinks)
        every = torch.arange(count, device=device) + first
        if not self.sinks:
            return (key[:, :, :0], value[:, :, :0], every.new_zeros(batch, 0)), torch.where(real, every, -1)
        match = sink[:, None] & (ranks[:, None] == torch.arange(self.sinks, device=device)[:, None])  # (B, S, N)
        exists, index = match.any(-1), match.int().argmax(-1)
        pairs = []
        for number, new in enumerate((key, value)):
            found = new.gather(2, index[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
            before = None if old is None else (old.keys, old.values)[number][:, :, : self.sinks]
            pairs.append(found if before is None else torch.where(exists[:, None, :, None], found, before))
        before = -1 if old is None else old.places[:, : self.sinks]
        return (*pairs, torch.where(exists, index + first, before)), torch.where(real & ~sink, every, -1)

    def causal(self):
        """Whether queries over as many keys need no mask."""
        limit = self.call.arguments.get("sliding_window")
        near = limit is not None and limit < self.sinks + self.window
        return self.call.implementation == "sdpa" and getattr(self.call.attention, "is_causal", True) and not near

    def band(self, query, begin, end, places, sinks, apart):
        """As `additive`, if only distances count: layers and blocks that are alike have one mask in a pass. apart: how
        far the first query is from the first key that is no sink."""
        limit = self.call.arguments.get("sliding_window")
        name = ("band", self.window, sinks, end - begin, places.shape[1], apart, limit, query.dtype, query.device)
        notes = self.call.exchange.notes
        if name not in notes:
            notes[name] = self.additive(query, begin, end, places, sinks)
        return notes[name]

    def additive(self, query, begin, end, places, sinks):
        """A mask (1 or B, 1 or h, R, E) that is added to scores. places: (1 or B, E), of which sinks are the first."""
        rows = torch.arange(begin, end, device=query.device)[:, None] + self.start
        places = places[:, None, None]  # (., 1, 1, E)
        seen = (places >= max(self.offset, 0)) & (places <= rows)
        near = rows - places < self.window
        near[..., :sinks] = True
        seen, limit = seen & near, self.call.arguments.get("sliding_window")
        if limit is not None and getattr(self.mask, "ndim", 2) == 2:
            seen = seen & (rows - places < limit)
        least = torch.finfo(query.dtype).min
        added = self.of_family(begin, end, (places[:, 0, 0] - self.offset).clamp(min=0))
        if added is None or added.dtype == torch.bool:
            seen = seen if added is None else seen & added
            return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, least)
        return torch.where(seen, added, least)

    def of_family(self, begin, end, columns):
        """These rows and columns (1 or B, E) of the family's mask, or None."""
        mask = self.mask
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor):  # of flex attention
            batch = torch.arange(mask.shape[0], device=columns.device)[:, None, None]
            rows = torch.arange(begin, end, device=columns.device)[None, :, None]
            return mask.mask_mod(batch, 0, rows, columns[:, None])[:, None]
        if mask.ndim == 2:  # of flash attention
            return mask.bool().gather(1, columns.expand(mask.shape[0], -1))[:, None, None]
        mask = mask if mask.shape[2] == 1 else mask[:, :, begin:end]
        if columns.shape[0] == 1:
            return mask.index_select(-1, columns[0])
        batch = max(mask.shape[0], columns.shape[0])
        mask = mask.expand(batch, -1, -1, -1)
        return mask.gather(-1, columns[:, None, None].expand(batch, *mask.shape[1:3], -1))

    def kernel(self, query, key, value, mask, places):
        """The family's attention of these: output (B, R, h, D), and, if the model's is eager attention, probabilities
        over all columns of its mask."""
        call, arguments = self.call, self.call.arguments
        eager = call.implementation == "eager"
        if not eager and call.implementation != "sdpa":
            needs = any(arguments.get(name) is not None for name in ("s_aux", "softcap"))
            call = replace(call, implementation="eager" if needs else "sdpa")
        arguments = {name: told for name, told in arguments.items() if name not in ("is_causal", "sliding_window")}
        if mask is None and call.implementation == "eager":
            mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
        output, made = call.kernel(query, key, value, mask, None, arguments)
        if not eager:
            return output, None
        columns = call.cached.columns if call.cached is not None else self.tokens
        if places is None:
            places = torch.arange(key.shape[2], device=key.device)[None]
        whole = made.new_zeros(*made.shape[:3], columns)
        index = (places - self.offset).clamp(min=0)[:, None, None].expand_as(made)
        return output, whole.scatter_add(-1, index, made * (mask > torch.finfo(mask.dtype).min / 2))

    def _kept(self, key, value, places, sinks, old, first):
        """What a cache keeps from now on."""
        total, new = first + key.shape[2], first + key.shape[2] - self.start
        margin = 0 if self.static else max(MARGIN, new) if new <= DRAFT and old is not None else MARGIN
        wanted = places_in(self.sinks, self.window, margin, total, key.device)
        low = 0 if old is None else old.keys.shape[2]
        index = low + wanted - first
        if old is not None:
            log = self.sinks + self.window + wanted % max(old.margin, 1)
            before = torch.where(wanted >= first - self.window, self.sinks + (wanted - self.sinks) % self.window, log)
            index = torch.where(wanted < first, before.clamp(max=low - 1), index)
        index = index.clamp(min=0)
        held = []
        for number, states in enumerate((key, value)):
            states = states if old is None else torch.cat([(old.keys, old.values)[number], states], dim=2)
            missing = states.new_zeros(*states.shape[:2], self.sinks - sinks[0].shape[2], states.shape[3])
            held.append(torch.cat([sinks[number], missing, states.index_select(2, index)], dim=2))
        settled = True
        if places is not None:
            places = places if old is None else torch.cat([old.places, places], dim=1)
            places = torch.where(wanted < self.sinks, -1, places[:, index])
            places = torch.cat([sinks[2], places], dim=1)
            settled = not torch.compiler.is_compiling() and bool((sinks[2] >= 0).all())
        lost = first if old is None else 0 if self.static else old.gone
        kept = Kept(self.sinks, self.window, margin, *held, places, total, lost, settled)
        return kept.fixed(old) if self.static else kept


def _rows(places):
    """Places (1 or B, .) beside each other."""
    batch = max(each.shape[0] for each in places)
    return torch.cat([each.expand(batch, -1) for each in places], dim=1)
