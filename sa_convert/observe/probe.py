"""Attention of a base model, seen and replaced while the model runs: any sharing map can be tried without a conversion.

Letters in shape comments: B sequences, H query heads, G KV groups, T tokens, D head size.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sa_convert.domain.sharing_map import Source
from sa_convert.families.family import Family, Stack
from sa_convert.observe import own_attention

if TYPE_CHECKING:
    import torch

NAME = "sa_convert_probe"
"""Of our attention function in the attention interface of transformers."""

Rows = Mapping[int, tuple[Source | None, ...]]
"""As `SharingMap.layers`."""


@dataclass(frozen=True)
class Kept:
    """A loan of attention weights (B, H, T, T)."""

    kept: "torch.Tensor"

    def weights(self) -> "torch.Tensor":
        return self.kept


@dataclass(frozen=True)
class Recomputed:
    """A loan from which the weights are computed again: query (B, H, T, D), key (B, G, T, D), and the module as it was.

    own: its own parameters (sinks), which may since have left the memory.
    """

    module: Any
    own: Mapping[str, "torch.Tensor"]
    query: "torch.Tensor"
    key: "torch.Tensor"
    mask: "torch.Tensor | None"
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, module: Any, query: Any, key: Any, mask: Any, arguments: Mapping[str, Any]) -> "Recomputed":
        own = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}
        return cls(module, own, query, key, mask, arguments)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["own"]
        return own[name] if name in own else getattr(self.__dict__["module"], name)

    def weights(self) -> "torch.Tensor":
        return _weights(self, self.query, self.key, self.mask, self.arguments)


Loans = dict[int, Kept | Recomputed]
"""What source layers have lent, by layer."""


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


@dataclass(frozen=True)
class Block:
    """One layer of the model, and the numbers of its attentions in the order in which they run."""

    module: Any
    attentions: tuple[int, ...]


class Probe:
    """Lets a base model run with its heads' attention observed, or replaced by that of a sharing map.

    model: a base model of `family`, which keeps every weight. Afterwards it runs through our attention function; its
    results without a map are those of eager attention. attentions: the attention module of every layer as layers are
    numbered, None where there is none; output_projections: likewise. blocks: the layers as they run.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family
        self.attentions: list[Any] = []
        self.output_projections: list[Any] = []
        self.blocks: list[Block] = []
        self._rows: Rows = {}
        self._sources: frozenset[int] = frozenset()
        self._observer: Callable[[Seen], None] | None = None
        self._loans: Loans = {}
        self._keep_weights = True
        model.requires_grad_(False)
        paths = dict.fromkeys(stack.layers for stack in family.all_stacks if _has_stack(model, family, stack))
        for path in paths:
            self._find([stack for stack in family.all_stacks if stack.layers == path])
            parent = _submodule(model, path.rpartition(".")[0]) if "." in path else model
            # What was lent in one pass is never seen in the next, and is not kept after it.
            parent.register_forward_pre_hook(lambda *_: self._loans.clear())
            parent.register_forward_hook(lambda *_: self._loans.clear())
        if family.modules.interface:
            self._enter_interface()
        else:
            own_attention.replace(self)

    def _find(self, stacks: list[Stack]) -> None:
        """Note the attentions of stacks that lie in the same layers."""
        from sa_convert.runtime.modeling_shared_attention import attentions_of

        modules = self.family.modules
        layers: list[Any] = list(_submodule(self.model, stacks[0].layers).children())
        numbers: list[list[int]] = [[] for _ in layers]
        for stack in stacks:
            found: list[Any] = list(attentions_of(self.model, modules, stack))
            for layer, attention, order in zip(layers, found, numbers, strict=True):
                output = None
                if attention is not None:
                    order.append(len(self.attentions))
                    attention.sa_convert_probe, attention.sa_convert_layer = self, len(self.attentions)
                    output = (layer if modules.output_outside else attention).get_submodule(modules.output)
                self.attentions.append(attention)
                self.output_projections.append(output)
        self.blocks += [Block(layer, tuple(order)) for layer, order in zip(layers, numbers, strict=True)]

    def _enter_interface(self) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.model.set_attn_implementation(NAME)

    def order(self) -> list[int]:
        """The numbers of all attentions, as they run."""
        return [number for block in self.blocks for number in block.attentions]

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

    @contextmanager
    def lending(self, loans: "Loans") -> Iterator[None]:
        """While open, layers that run one by one find and leave the attention of source layers in `loans`, as queries
        and keys, which take less memory than weights."""
        before, self._loans, self._keep_weights = self._loans, loans, False
        try:
            yield
        finally:
            self._loans, self._keep_weights = before, True

    def attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, arguments: dict[str, Any]) -> Any:
        import torch

        layer = module.sa_convert_layer
        row = self._rows.get(layer)
        weights = _weights(module, query, key, mask, arguments)
        if layer in self._sources:
            keep = self._keep_weights
            self._loans[layer] = Kept(weights) if keep else Recomputed.of(module, query, key, mask, arguments)
        used = weights
        if row is not None:
            lent = {source[0]: self._loans[source[0]].weights() for source in row if source is not None}
            heads = [
                weights[:, head] if source is None else lent[source[0]][:, source[1]].to(weights.device)
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
    if not hasattr(module, "sa_convert_probe"):  # such as an image encoder's
        return _eager(module)(module, query, key, value, attention_mask, **arguments)
    return module.sa_convert_probe.attend(module, query, key, value, attention_mask, arguments)


def _submodule(model: Any, path: str) -> Any:
    """A part of a model by its path in a language model."""
    from sa_convert.runtime.modeling_shared_attention import path_in

    return model.get_submodule(path_in(model, path) or path)


def _has_stack(model: Any, family: Family, stack: Stack) -> bool:
    """An encoder may stand alone."""
    from sa_convert.runtime.modeling_shared_attention import path_in

    return not family.encoder_decoder or path_in(model, stack.layers) is not None


def _weights(module: Any, query: Any, key: Any, mask: Any, arguments: Mapping[str, Any]) -> "torch.Tensor":
    """Attention weights (B, H, T, S) by the family's own eager function, which applies its softcap and sinks."""
    # Zero-width values: only the weights are wanted here.
    nothing = key[..., :0]
    weights: torch.Tensor = _eager(module)(module, query, key, nothing, mask, **arguments)[1]
    return weights


def _eager(module: Any) -> Callable[..., Any]:
    ours: Callable[..., Any] | None = getattr(module, "family_eager", None)
    if ours is not None:
        return ours
    for kind in type(module.module if isinstance(module, Recomputed) else module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            found: Callable[..., Any] = function
            return found
    raise LookupError(f"{type(module).__name__} has no eager attention function")
