"""How much work a prefill and a decoding step are, as far as weights, sharing map and cache tell.

The ratio of the work of two models is what the ratio of their times is expected to be:

- A step is bound by memory. It reads its weights once, whatever the batch, and what is cached of every sequence. A
  reusing head has no key in the cache; it reads its source's probabilities, one number for each token in view.
- A prefill is bound by arithmetic. Every token is multiplied with all matrices, and each head multiplies its query with
  the keys, and its probabilities with the values, of the tokens in view. A reusing head does only the latter.

Left out: softmax, norms and other work on each element, the copy that a dynamic cache makes of itself at every step,
and everything that a kernel does beyond what is needed.
"""

from dataclasses import dataclass

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.sharing_map import SharingMap
from sa_convert.errors import UnsupportedModelError
from sa_convert.families.family import Family
from sa_convert.measure.speed.parameters_read import Weights
from sa_convert.plan.converted import converted_parts
from sa_convert.read.family_of import family_of
from sa_convert.read.geometry_of import geometry_of
from sa_convert.read.names import attention_prefix


@dataclass(frozen=True)
class Attention:
    """Attention of one layer. heads: query heads, `own` of which compute probabilities. size: elements of a head's
    query and of its key; value_size: of its value. window: tokens in view, or None for all. causal: a token sees none
    after it. cached: a decoding step runs it."""

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
    """All layers with softmax attention, or None in a family that sa-convert does not know.

    Chunks, of layers that attend within those, are taken to be longer than the context.
    """
    try:
        if converted:
            family, geometry, sharing = converted_parts(checkpoint)
        else:
            family = family_of(checkpoint.config, checkpoint.tensors)
            geometry, sharing = geometry_of(checkpoint, family), SharingMap()
    except UnsupportedModelError:
        return None
    cross = {stack.name for stack in family.all_stacks if stack.cross}
    return tuple(
        Attention(
            heads=layer.heads,
            own=len(sharing.own_heads(index, layer)),
            size=layer.head_dim,
            value_size=_value_size(checkpoint, family, geometry, index),
            window=layer.window,
            causal=layer.cached and layer.stack not in cross,
            cached=layer.cached,
        )
        for index, layer in enumerate(geometry.layers)
        if layer.heads
    )


def prefill_flops(weights: Weights, layers: tuple[Attention, ...] | None, context: int, batch: int) -> int | None:
    """Multiplications and additions of a prefill over `batch` sequences, or None where the layers are not known."""
    if layers is None:
        return None
    dense = weights.matrices * context + weights.head * (1 if weights.keeps_one else context)
    attention = sum(
        layer.pairs(context) * (layer.own * layer.size + layer.heads * layer.value_size) for layer in layers
    )
    return 2 * batch * (dense + attention)


def step_bytes(
    weights: Weights, layers: tuple[Attention, ...] | None, cache: int | None, context: int, batch: int, itemsize: int
) -> int | None:
    """Bytes that a decoding step reads, or None without a cache. cache: bytes of it, of all sequences. itemsize: bytes
    of a probability."""
    if weights.step_bytes is None or cache is None:
        return None
    borrowed = sum(
        (layer.heads - layer.own) * min(layer.window or context, context) for layer in layers or () if layer.cached
    )
    return weights.step_bytes + cache + batch * borrowed * itemsize


def _value_size(checkpoint: Checkpoint, family: Family, geometry: ModelGeometry, index: int) -> int:
    layer = geometry.layers[index]
    if family.modules.fused:
        return layer.head_dim
    prefix = attention_prefix(checkpoint, family, geometry.stacks, index)
    shape = checkpoint.tensors[f"{prefix}{family.modules.value}.weight"].shape
    return shape[1 if family.modules.transposed else 0] // layer.groups
