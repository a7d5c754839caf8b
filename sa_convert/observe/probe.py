"""Attention of a base model, seen and replaced while the model runs: any sharing map can be tried without a conversion.

Letters in shape comments: B sequences, H query heads, G KV groups, T tokens, D head size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sa_convert.domain.sharing_map import Source
from sa_convert.families.family import Family, Stack
from sa_convert.observe import own_attention
from sa_convert.observe.attention_call import Call, eager_of

NAME = "sa_convert_probe"
"""Of our attention function in the attention interface of transformers."""

Sources = Mapping[int, tuple[Source | None, ...]]
"""For each layer that reuses, per query head its source, or None; as `SharingMap.layers`."""


Loans = dict[int, torch.Tensor | Call]
"""What source layers have lent, by layer: probabilities (B, H, T, S), or the call that they are computed from again."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One layer's attention in one forward pass.

    probabilities: (B, H, T, T) of the layer's own heads; used: the same, with those of the sources where heads reuse;
    value: (B, G, T, D); output: (B, T, H, D), used times value.
    """

    layer: int
    probabilities: torch.Tensor
    used: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


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
        self._map: Sources = {}
        self._lenders: frozenset[int] = frozenset()
        self._observer: Callable[[Seen], None] | None = None
        self._loans: Loans = {}
        self._keep_probabilities = True
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
            attentions: list[Any] = list(attentions_of(self.model, modules, stack))
            for layer, attention, order in zip(layers, attentions, numbers, strict=True):
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
    def sharing(self, sources: Sources) -> Iterator[None]:
        """While open, heads use the attention of their sources in this map."""
        before = self._map, self._lenders
        self._map = sources
        self._lenders = frozenset(source[0] for heads in sources.values() for source in heads if source is not None)
        try:
            yield
        finally:
            self._map, self._lenders = before

    @contextmanager
    def observing(self, observer: Callable[[Seen], None]) -> Iterator[None]:
        """While open, `observer` is called for every layer that attends."""
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    @contextmanager
    def lending(self, loans: Loans) -> Iterator[None]:
        """While open, layers that run one by one find and leave the attention of source layers in `loans`, as queries
        and keys, which take less memory than probabilities."""
        before, self._loans, self._keep_probabilities = self._loans, loans, False
        try:
            yield
        finally:
            self._loans, self._keep_probabilities = before, True

    def attend(self, call: Call, value: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The output (B, T, H, D) of one layer, under the map and told to the observer."""
        layer = call.module.sa_convert_layer
        used = probabilities = call.probabilities()
        if layer in self._lenders:
            self._loans[layer] = probabilities if self._keep_probabilities else call.lasting()
        sources = self._map.get(layer)
        if sources is not None:
            lent = {source[0]: self._borrowed(source[0]) for source in sources if source is not None}
            heads = [
                probabilities[:, head] if source is None else lent[source[0]][:, source[1]].to(probabilities.device)
                for head, source in enumerate(sources)
            ]
            used = torch.stack(heads, dim=1)
        batch, total, tokens, length = used.shape
        grouped = used.reshape(batch, value.shape[1], -1, length)
        output = torch.matmul(grouped, value).view(batch, total, tokens, -1).transpose(1, 2)
        if self._observer is not None:
            self._observer(Seen(layer=layer, probabilities=probabilities, used=used, value=value, output=output))
        return output.contiguous(), None

    def _borrowed(self, layer: int) -> torch.Tensor:
        loan = self._loans[layer]
        return loan.probabilities() if isinstance(loan, Call) else loan


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any) -> Any:
    if not hasattr(module, "sa_convert_probe"):  # such as an image encoder's
        return eager_of(module)(module, query, key, value, attention_mask, **arguments)
    call = Call(module=module, query=query, key=key, mask=attention_mask, arguments=arguments)
    return module.sa_convert_probe.attend(call, value)


def _submodule(model: Any, path: str) -> Any:
    """A part of a model by its path in a language model."""
    from sa_convert.runtime.modeling_shared_attention import path_in

    return model.get_submodule(path_in(model, path) or path)


def _has_stack(model: Any, family: Family, stack: Stack) -> bool:
    """An encoder may stand alone."""
    from sa_convert.runtime.modeling_shared_attention import path_in

    return not family.encoder_decoder or path_in(model, stack.layers) is not None
