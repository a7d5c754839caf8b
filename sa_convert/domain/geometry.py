"""The shape of a model's attention, layer by layer, as far as plans depend on it."""

from dataclasses import dataclass
from functools import cached_property

from sa_convert.domain.stacks import Stacks, layer_label

Head = tuple[int, int]
"""A layer and a query head in it."""


@dataclass(frozen=True)
class LayerGeometry:
    """Attention of one layer.

    heads: query heads; 0 in a layer without softmax attention. groups: key/value heads, each read by `heads // groups`
    query heads. head_dim: elements of one head's query and key. attention: type in the words of transformers
    ("full_attention", "sliding_attention"), "none" without softmax attention. window: tokens in the sliding window, or
    None. rotary: whether queries and keys are rotated by position. stack: which kind of attention of an encoder-decoder
    ("encoder", "decoder", "decoder.cross"); "" if a model has one kind. cached: whether its keys and values are kept
    from one generated token to the next; an encoder's are not. value_dim: elements of one head's value; None: as many
    as of its key. stored: dtype of its values in the files, in which the cache is counted.
    """

    heads: int
    groups: int
    head_dim: int
    attention: str = "full_attention"
    window: int | None = None
    rotary: bool = True
    stack: str = ""
    cached: bool = True
    value_dim: int | None = None
    stored: str = "F32"

    @property
    def values(self) -> int:
        """Elements of one head's value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def group_size(self) -> int:
        """Query heads per KV group."""
        return self.heads // self.groups

    @property
    def kind(self) -> str:
        """Its attention in a word: "full", or "sliding(512)"."""
        name = "no softmax attention" if self.attention == "none" else self.attention.removesuffix("_attention")
        if not self.heads:
            return name
        window = f"({self.window})" if self.window else ""
        return name + window + ("" if self.rotary else " without rotary")

    def group_of(self, head: int) -> int:
        return head // self.group_size

    def heads_of(self, group: int) -> range:
        return range(group * self.group_size, (group + 1) * self.group_size)


@dataclass(frozen=True)
class ModelGeometry:
    """All layers; granularity is the smallest unit that can do without scores of its own: "head" or "layer".

    turning: why keys cannot be cached before they are turned by position, or None if they can. weighing: why values
    cannot have fewer numbers, though those of a head are summed up and projected, or None if they can. merging: why
    layers cannot have fewer KV groups, or None if they can.
    """

    layers: tuple[LayerGeometry, ...]
    granularity: str = "head"
    turning: str | None = None
    weighing: str | None = None
    merging: str | None = None

    @property
    def total_groups(self) -> int:
        return sum(layer.groups for layer in self.layers)

    def keys(self, layer: int, groups: int) -> int:
        """Elements that so many KV groups of a layer add to the key cache for each token: none in an encoder beside a
        decoder. In a model that caches nothing, the keys that are computed count instead."""
        counted = self.layers[layer].cached or not any(other.cached and other.heads for other in self.layers)
        return groups * self.layers[layer].head_dim if counted else 0

    @cached_property
    def stacks(self) -> Stacks:
        """() if the model has one kind of attention."""
        names = dict.fromkeys(layer.stack for layer in self.layers)
        counts = tuple((name, sum(layer.stack == name for layer in self.layers)) for name in names)
        return () if set(names) == {""} else counts

    def label(self, layer: int) -> str:
        """How people name a layer: "27", or "decoder.cross.3"."""
        return layer_label(self.stacks, layer)
