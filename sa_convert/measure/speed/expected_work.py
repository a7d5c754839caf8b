"""How much work a prefill and a decoding step are, as far as weights, plan and cache tell.

The ratio of the work of two models is what the ratio of their times is expected to be:

- A step is bound by memory. It reads its weights once, whatever the batch, and what is cached of every sequence. A
  head without scores of its own has no key in the cache; it reads another's probabilities, one number for each token in
  view.
- A prefill is bound by arithmetic. Every token is multiplied with all matrices, and each head multiplies its query with
  the keys, and its probabilities with the values, of the tokens in view. A head without scores of its own does only
  the latter.

Left out: softmax, norms and other work on each element, the copy that a dynamic cache makes of itself at every step,
and everything that a kernel does beyond what is needed.
"""

from collections import defaultdict
from dataclasses import dataclass

from sa_convert.domain.answers import Answers
from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.plan import Plan
from sa_convert.errors import UnsupportedModelError
from sa_convert.measure.speed.parameters_read import Weights
from sa_convert.plan.converted import converted_parts
from sa_convert.read.model_of import model_of
from sa_convert.treatments.plan_answers import layer_answers


@dataclass(frozen=True)
class Attention:
    """Attention of the KV groups of one layer that see as many tokens.

    heads: query heads that put something out, `own` of which compute probabilities; the others read those of other
    heads. size: elements of a head's query and of its key; value_size: of its value. window: tokens in view, or None
    for all. causal: a token sees none after it. cached: a decoding step runs it.
    """

    heads: int
    own: int
    size: int
    value_size: int
    window: int | None
    causal: bool
    cached: bool

    def pairs(self, context: int) -> int:
        """How many pairs of a token and one in its view there are in a sequence."""
        view = min(self.window or context, context)
        if not self.causal:
            return context * view
        return view * (view + 1) // 2 + (context - view) * view


def attention_layers(checkpoint: Checkpoint, converted: bool) -> tuple[Attention, ...] | None:
    """All layers with softmax attention, KV groups of different windows apart; None in a family that is not known.

    Chunks, of layers that attend within those, are taken to be longer than the context.
    """
    try:
        model, plan = converted_parts(checkpoint) if converted else (model_of(checkpoint), Plan())
    except UnsupportedModelError:
        return None
    cross = {stack.name for stack in model.family.all_stacks if stack.cross}
    layers = []
    for index, layer in enumerate(model.geometry.layers):
        by_window: dict[tuple[int | None, int, int], list[Answers]] = defaultdict(list)
        for answers in layer_answers(plan, model.geometry, index) if layer.heads else ():
            limits = [limit for limit in (layer.window, answers.reach) if limit is not None]
            size = layer.head_dim if layer.rotary or not answers.keys else answers.keys  # turned keys are expanded
            by_window[min(limits, default=None), size, answers.values].append(answers)
        for (window, size, values), groups in by_window.items():
            layers.append(
                Attention(
                    heads=sum(len(answers.heads) for answers in groups),
                    own=sum(len(answers.scores) for answers in groups),
                    size=size,
                    value_size=values,
                    window=window,
                    causal=layer.cached and layer.stack not in cross,
                    cached=layer.cached,
                )
            )
    return tuple(layers)


def prefill_flops(weights: Weights, layers: tuple[Attention, ...] | None, context: int, batch: int) -> int | None:
    """Multiplications and additions of a prefill over `batch` sequences, or None if the layers are not known."""
    if layers is None:
        return None
    dense = weights.matrices * context + weights.head * (1 if weights.keeps_one else context)
    attention = sum(
        layer.pairs(context) * (layer.own * layer.size + layer.heads * layer.value_size) for layer in layers
    )
    return 2 * batch * (dense + attention)


def step_bytes(
    weights: Weights,
    layers: tuple[Attention, ...] | None,
    *,
    cache: int | None,
    context: int,
    batch: int,
    itemsize: int,
) -> int | None:
    """Bytes that a decoding step reads, or None without a cache. cache: bytes of it, of all sequences. itemsize: bytes
    of a probability."""
    if weights.step_bytes is None or cache is None:
        return None
    read = sum(
        (layer.heads - layer.own) * min(layer.window or context, context) for layer in layers or () if layer.cached
    )
    return weights.step_bytes + cache + batch * read * itemsize
