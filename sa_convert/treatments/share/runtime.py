"""Attention shared across layers: a query head uses the probabilities that a head of an earlier layer computed.

*Shared Attention* (Liao & Vargas, arXiv 2407.12866), by query head: a head either owns its attention, or borrows that
of one *source* head. A KV group none of whose heads own their attention has no query and no key projection, and caches
no keys. Sharing probabilities equals attention over the source's query and key, so there are two forms:

- *Weights*: the source's probabilities are multiplied with the values; no Q.K and no softmax. They take memory for
  every pair of tokens, so this is for decoding, and for prompts whose probabilities fit in `weights_memory`. They are
  made in blocks of tokens that fit in a processor's cache. If no mask says more than that each token sees those before
  it, a block ends at its last token's key: half of the pairs of a prompt are never computed, as in causal kernels.
- *Queries*: the source's query and key go through the attention kernel once more, without the quadratic memory.

The layer that lends decides call by call. Letters in shape comments are those of `modeling_shared_attention`; R is the
number of tokens in a block, E that of the keys it may see.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch

WEIGHTS_MEMORY = 128 * 1024 * 1024
"""Bytes that lent probabilities may take at any one time by default (`weights_memory` in the config)."""

FORMS = ("auto", "weights", "queries")
"""Values of `form` in the config."""

BLOCK = 128
"""Query tokens in a block of probabilities."""

# Folding heads into tokens makes a graph with a dynamic number of tokens refuse some of them. (From torch 2.7 on.)
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@dataclass(frozen=True)
class Loan:
    """What a source layer lends: the attention of its own heads, in their order. query: (B, O, T, D); key: (B, own
    groups, S, D), cache included; weights: probabilities in blocks (B, O, R, E), or None in the queries form;
    arguments: what the family hands to its kernel besides; mask: (B, O, T, S) if it differs by head (ALiBi), or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    weights: list | None
    arguments: dict
    mask: torch.Tensor | None = None


class Run(NamedTuple):
    """Consecutive heads `start:stop` along the head axis of a loan of `layer`, or of the layer's own (None)."""

    layer: int | None
    start: int
    stop: int


def _runs(places):
    """Join consecutive places (layer, index) of one layer."""
    keyed = groupby(enumerate(places), key=lambda item: (item[1][0], item[1][1] - item[0]))
    runs = ([place for _, place in items] for _, items in keyed)
    return tuple(Run(run[0][0], run[0][1], run[-1][1] + 1) for run in runs)


@dataclass(frozen=True)
class Borrowing:
    """What one layer owns, lends and borrows. heads: per query head None or (source layer, source head); own_group: own
    heads in each own group if that is the same for all, else None; query_runs: for every head, where its query (or
    probabilities) lies; key_runs, key_group: where the keys lie, and how many consecutive heads read each; settled:
    sources that are done after this layer."""

    heads: tuple
    group: int
    own: tuple
    own_groups: tuple
    own_group: int | None
    query_runs: tuple
    key_runs: tuple
    key_group: int
    lends: bool
    settled: tuple

    @property
    def lenders(self):
        return sorted({run.layer for run in self.query_runs if run.layer is not None})


class Share:
    """Sharing in one stack. stack: see `modeling_shared_attention.treat`. Raises ValueError if the map does not fit."""

    def __init__(self, stack):
        self.name, self.options = stack.name, stack.options
        if self.options.get("form", "auto") not in FORMS:
            form = self.options["form"]
            raise ValueError(f"shared_attention: form is {form!r}, but should be one of {', '.join(FORMS)}.")
        full = {}
        for layer in stack.shapes:
            full[layer] = self._row(stack, layer, full)
        last_use = {source[0]: layer for layer, row in full.items() for source in row if source}
        own = {layer: tuple(head for head, source in enumerate(row) if source is None) for layer, row in full.items()}
        borrowed = sum(len(full[layer]) - len(own[layer]) for layer in full)
        # Heads that borrow for each head that lends: from 1 on, the weights form pays for a whole prompt.
        self.gain = borrowed / max(sum(len(own[layer]) for layer in last_use), 1)
        self.at_once = max((sum(at <= layer < last for at, last in last_use.items()) for layer in full), default=0)
        self.lenders = tuple(last_use)
        # Tensor parallelism gives each process the same heads of every layer, and of a projection what it divides.
        changed = [row for row in full.values() if any(row)]
        self.divisible = all(source and source[1] == head for row in changed for head, source in enumerate(row))
        groups = {layer: group for layer, (_, group, _) in stack.shapes.items()}
        self.layers = {
            layer: self._borrowing(layer, full, own, groups, last_use)
            for layer, row in full.items()
            if any(row) or layer in last_use
        }

    @staticmethod
    def _row(stack, layer, before):
        """For each head of a layer its source, by its number among the heads that are left of its layer, or None.
        before: the rows of earlier layers."""
        heads, group, _ = stack.shapes[layer]
        row = [None] * heads
        for number, sources in stack.layers.get(layer, {}).items():
            first = (number or 0) * group
            if number is None or len(sources) != group or first + group > heads:
                raise ValueError(
                    f"shared_attention: layer {layer} lists {len(sources)} heads in KV group {number}, the model has "
                    f"{heads // group} groups of {group} heads."
                )
            for head, (at, source) in [(first + place, map(int, pair)) for place, pair in enumerate(sources) if pair]:
                left = stack.heads[at] if at in before else ()
                if source not in left or before[at][left.index(source)] is not None:
                    raise ValueError(
                        f"shared_attention: layer {layer} head {head} reuses layer {at} head {source}, which is not an "
                        "own head of an earlier layer."
                    )
                row[head] = at, left.index(source)
        return tuple(row)

    @staticmethod
    def _borrowing(layer, full, own, groups, last_use):
        own_groups = {at: sorted({head // groups[at] for head in own[at]}) for at in full}
        queries, keys = [], []
        for head, source in enumerate(full[layer]):
            at, index = source or (layer, head)
            queries.append((source and at, own[at].index(index)))
            keys.append((source and at, own_groups[at].index(index // groups[at])))
        group = groups[layer]
        aligned = all(len(set(keys[start : start + group])) == 1 for start in range(0, len(keys), group))
        sizes = {sum(head // group == kept for head in own[layer]) for kept in own_groups[layer]}
        return Borrowing(
            heads=full[layer],
            group=group,
            own=own[layer],
            own_groups=tuple(own_groups[layer]),
            own_group=sizes.pop() if len(sizes) == 1 else None,
            query_runs=_runs(queries),
            key_runs=_runs(keys[::group] if aligned else keys),
            key_group=group if aligned else 1,
            lends=layer in last_use,
            settled=tuple(source for source, last in last_use.items() if last == layer),
        )

    def touches(self, layer):
        return layer in self.layers

    def own_heads(self, layer):
        return self.layers[layer].own

    def unserved(self):
        """Why an attention layer that has one key for each KV group does not do, or None."""
        for number, layer in self.layers.items():
            if layer.key_group != layer.group:
                return f"heads of one KV group of layer {number} have different keys, and vLLM has one key for them"
        return None

    def attend(self, call, query, key, value, mask, then):
        """Own heads from query and key, the others from the exchange. mask: for all heads alike, or (., H, T, S)."""
        layer, exchange, arguments = self.layers[call.layer], call.exchange, call.arguments
        loans = {at: exchange.borrow((self.name, at)) for at in layer.lenders}
        if loans:
            weights_form = all(loan.weights is not None for loan in loans.values())
            arguments = arguments if query is not None else next(iter(loans.values())).arguments
        else:
            weights_form = self._lends_weights(call, layer, query, key.shape[-2], mask)
        own_mask = None
        if query is not None and mask is not None and mask.shape[1] > 1:
            own_mask = mask = mask if len(layer.own) == mask.shape[1] else mask[:, list(layer.own)]
        whole, blocks = call.implementation == "eager" or torch.compiler.is_compiling(), None
        if weights_form and query is not None:
            blocks = self._own_blocks(call, layer, query, key, mask, whole)
        if query is not None and layer.lends:
            exchange.lend((self.name, call.layer), Loan(query, key, blocks, arguments, own_mask))
        if weights_form:
            if loans:
                first = next(iter(loans.values())).weights
                blocks = [
                    _gather(layer.query_runs, blocks and blocks[number], lambda at, n=number: loans[at].weights[n])
                    for number in range(len(first))
                ]
            outputs = [weigh(block, value) for block in blocks]
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
            found = output, (blocks[0] if whole else None)
        elif loans:
            given = {"query": query, "key": key, "value": value, "mask": mask, "own_mask": own_mask}
            found = self._attend_queries(call, layer, loans, **given, arguments=arguments)
        else:
            found = then(query, key, value, mask)
        exchange.settle([(self.name, at) for at in layer.settled])
        return found

    def _lends_weights(self, call, layer, query, length, mask):
        """Whether this call lends probabilities (B, O, T, S) rather than queries and keys."""
        form, kernel, tokens = self.options.get("form", "auto"), call.implementation, query.shape[-2]
        if kernel == "eager" or form == "queries":
            return form != "queries"
        if kernel != "sdpa" and form == "weights":
            raise ValueError(f"shared_attention: the weights form needs eager or sdpa, not {kernel}.")
        if kernel != "sdpa" or form == "weights":
            return form == "weights"
        # Compiled, a prompt's blocks would make a graph for every length.
        if tokens > 1 and (torch.is_grad_enabled() or self.gain < 1 or torch.compiler.is_compiling()):
            return False
        if is_exporting():  # one token's fit, and an exported graph must not depend on how many are cached
            return True
        pairs = sum(
            (stop - start) * seen for start, stop, seen in blocks_of(tokens, length, _is_triangular(call, mask, tokens))
        )
        needed = query.shape[0] * len(layer.heads) * pairs * query.element_size() * self.at_once
        return needed <= self.options.get("weights_memory", WEIGHTS_MEMORY)

    def _own_blocks(self, call, layer, query, key, mask, whole):
        """Probabilities of own heads: blocks (B, O, R, E)."""
        tokens, length, dtype, group = query.shape[-2], key.shape[-2], query.dtype, layer.own_group
        triangular = _is_triangular(call, mask, tokens)
        if call.implementation != "eager" and dtype.itemsize < 4:
            # Fused kernels keep scores in float32, so who chose one must not get less: below it, scores of heads with
            # large biases overflow (float16) or lose what tells tokens apart (bfloat16).
            query, key = query.float(), key.float()
        if group is None:
            key, group = key[:, [layer.own_groups.index(head // layer.group) for head in layer.own]], 1
        mask, found = additive(mask, query, length), []
        for start, stop, seen in (
            [(0, tokens, tokens if triangular else length)] if whole else blocks_of(tokens, length, triangular)
        ):
            rows = query if stop - start == tokens else query[:, :, start:stop]
            if triangular:
                mask = query.new_full((1, 1, stop - start, stop), torch.finfo(query.dtype).min).triu_(start + 1)
            every = mask is None or mask.shape[-2] in (1, stop - start)
            rows_mask = mask if every else mask[:, :, start:stop]
            keys = key if seen == length else key[:, :, :seen]
            found.append(_probabilities(call, rows, keys, rows_mask, group).to(dtype))
        return found

    def _attend_queries(self, call, layer, loans, *, query, key, value, mask, own_mask, arguments):
        """Borrowed queries and keys take the place of the missing ones, and the kernel does the rest."""
        sinks, wanted = arguments.get("s_aux"), arguments.get("scaling")
        if sinks is not None:
            own = sinks[None] if query is not None else None
            sinks = _gather(layer.query_runs, own, lambda at: loans[at].arguments["s_aux"][None])[0]
            arguments = {**arguments, "s_aux": sinks}
        if own_mask is not None or next(iter(loans.values())).mask is not None:
            mask = _gather(layer.query_runs, own_mask, lambda at: loans[at].mask)

        def rescaled(at):
            """The loan's query for a kernel that scales scores as `arguments` say: layers may differ in that."""
            scaling = loans[at].arguments.get("scaling")
            return loans[at].query if wanted == scaling else loans[at].query * (scaling / wanted)

        query = _gather(layer.query_runs, query, rescaled).to(value.device)
        key = _gather(layer.key_runs, key, lambda at: loans[at].key).to(value.device)
        if layer.key_group != layer.group:
            value = value.repeat_interleave(layer.group, dim=1)
        if "flex" in call.implementation:  # it compiles a kernel for every order in memory, up to a limit
            query, key = query.transpose(1, 2).contiguous().transpose(1, 2), key.contiguous()
            value = value.contiguous()
        return call.kernel(query, key, value, mask, layer.key_group, arguments, sinks)


def _gather(runs, own, borrowed):
    """Concatenate runs along the head axis: own is this layer's tensor or None, borrowed(layer) that of a loan. Raises
    RuntimeError if heads are missing, as in a process that tensor parallelism gave a share of them."""
    pieces = []
    for run in runs:
        heads = own if run.layer is None else borrowed(run.layer)
        if run.stop > heads.shape[1] > 1 and (len(runs) > 1 or run.start):
            raise RuntimeError(
                "shared_attention: a head reuses one that is not in this process. Heads that reuse others than their "
                "own number cannot be divided: leave attention out of the tp_plan."
            )
        pieces.append(heads if not run.start and run.stop == heads.shape[1] else heads[:, run.start : run.stop])
    if len(pieces) == 1:
        return pieces[0]
    device = pieces[-1].device if own is None else own.device
    batch = max(piece.shape[0] for piece in pieces)  # a mask may be one for all sequences
    pieces = [piece if piece.shape[0] == batch else piece.expand(batch, *piece.shape[1:]) for piece in pieces]
    return torch.cat([piece.to(device) for piece in pieces], dim=1)


def _is_triangular(call, mask, tokens):
    """Whether no mask means that each token sees those before it, as kernels have it."""
    return mask is None and tokens > 1 and call.attention.is_causal and call.implementation != "eager"


def blocks_of(tokens, length, triangular):
    """The blocks of T tokens over S keys: [(first token, last token + 1, keys seen)]. triangular: as kernels mean
    causal attention without a mask, the first token sees the first key, whatever else a static cache has room for."""
    if not triangular and tokens <= BLOCK:
        return [(0, tokens, length)]
    ends = [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
    return [(start, stop, stop if triangular else length) for start, stop in ends]


def additive(mask, query, length):
    """A mask as eager attention adds it: SDPA's may be boolean or longer than the keys."""
    mask = None if mask is None else mask[..., :length]
    if mask is None or mask.dtype != torch.bool:
        return mask
    least = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, least)


def _probabilities(call, query, key, mask, group):
    """(B, O, R, E) of query (B, O, R, D) and key (B, O / group, E, D), by the family's eager function, which applies
    its softcap and sinks."""
    heads, tokens = query.shape[1:3]
    folded = 1 if call.attention.names.sinks or is_exporting() else group
    if folded > 1:
        # Queries that read one key stand in as so many tokens of one head, so that no key is repeated.
        if mask is not None and mask.shape[1] > 1:
            mask = mask.unflatten(1, (-1, group)).flatten(2, 3)
        elif mask is not None and tokens > 1:
            mask = torch.cat([mask] * group, dim=2)
        query, group = query.unflatten(1, (heads // group, group)).flatten(2, 3), 1
    # Zero-width values: only the probabilities are wanted here.
    weights = replace(call, implementation="eager").kernel(query, key, key[..., :0], mask, group)[1]
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
