"""Attention of a base model, seen and replaced while the model runs: any sharing map can be tried without a conversion.

Letters in shape comments: B sequences, H query heads, G KV groups, T tokens, D head size.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_convert.data.sharing_map import Source
from sa_convert.export.shared_attention_families import Family

if TYPE_CHECKING:
    import torch

NAME = "sa_convert_probe"
"""Of our attention function in the attention interface of transformers."""

Rows = Mapping[int, tuple[Source | None, ...]]
"""As `SharingMap.layers`."""


@dataclass(frozen=True)
class Seen:
    """One layer's attention in one forward pass.

    weights: (B, H, T, T) of the layer's own heads; used: the same, with those of the sources where heads reuse;
    value: (B, G, T, D); output: (B, T, H, D), used times value.
    """

    layer: int
    weights: "torch.Tensor"
    used: "torch.Tensor"
    value: "torch.Tensor"
    output: "torch.Tensor"


class Probe:
    """Lets a base model run with its heads' attention observed, or replaced by that of a sharing map.

    model: a base model of `family`, which keeps every weight. Afterwards it runs through our attention function; its
    results without a map are those of eager attention.
    """

    def __init__(self, model: Any, family: Family) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        self.model, self.family = model, family
        self.layers = model.get_submodule(family.layers)
        self.attentions = [getattr(layer, family.attention) for layer in self.layers]
        self._rows: Rows = {}
        self._sources: frozenset[int] = frozenset()
        self._observer: Callable[[Seen], None] | None = None
        self._weights: dict[int, torch.Tensor] = {}
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        model.set_attn_implementation(NAME)
        for attention in self.attentions:
            attention.sa_convert_probe = self
        stack = model.get_submodule(family.layers.rpartition(".")[0])
        stack.register_forward_pre_hook(lambda *_: self._weights.clear())
        stack.register_forward_hook(lambda *_: self._weights.clear())

    @property
    def output_projections(self) -> list[Any]:
        return [getattr(attention, self.family.output) for attention in self.attentions]

    @contextmanager
    def sharing(self, rows: Rows) -> Iterator[None]:
        """While open, heads use the attention weights of their sources in this map."""
        before = self._rows, self._sources
        self._rows = rows
        self._sources = frozenset(source[0] for row in rows.values() for source in row if source is not None)
        try:
            yield
        finally:
            self._rows, self._sources = before

    @contextmanager
    def observing(self, observer: Callable[[Seen], None]) -> Iterator[None]:
        """While open, `observer` is called for every layer that attends."""
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    def weights_of(self, layer: int) -> "torch.Tensor":
        """(B, H, T, T) that a source layer had in this pass."""
        return self._weights[layer]

    @contextmanager
    def lending(self, weights: "dict[int, torch.Tensor]") -> Iterator[None]:
        """While open, layers that run one by one find and leave the weights of sources here."""
        before, self._weights = self._weights, weights
        try:
            yield
        finally:
            self._weights = before

    def attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, arguments: dict[str, Any]) -> Any:
        import torch

        layer = module.layer_idx
        row = self._rows.get(layer)
        # Zero-width values: only the weights are wanted here.
        weights = _eager(module)(module, query, key, value[..., :0], mask, **arguments)[1]
        if layer in self._sources:
            self._weights[layer] = weights
        used = weights
        if row is not None:
            heads = [
                weights[:, head] if source is None else self._weights[source[0]][:, source[1]].to(weights.device)
                for head, source in enumerate(row)
            ]
            used = torch.stack(heads, dim=1)
        batch, total, tokens, length = used.shape
        grouped = used.reshape(batch, value.shape[1], -1, length)
        output = torch.matmul(grouped, value).view(batch, total, tokens, -1).transpose(1, 2)
        if self._observer is not None:
            self._observer(Seen(layer, weights, used, value, output))
        return output.contiguous(), None


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any) -> Any:
    return module.sa_convert_probe.attend(module, query, key, value, attention_mask, arguments)


def _eager(module: Any) -> Callable[..., Any]:
    """The eager attention of the module's family, which applies its softcap and sinks."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise LookupError(f"{type(module).__name__} has no eager attention function")
