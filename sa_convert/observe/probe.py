"""Attention of a base model, seen and replaced while the model runs: any plan can be tried without a conversion.

Letters in shape comments: B sequences, H query heads, G KV groups, T tokens, D head size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from typing import Any

import torch

from sa_convert.domain.plan import Plan
from sa_convert.families.family import Family, Stack
from sa_convert.observe import own_attention
from sa_convert.observe.attention_call import Call, eager_of
from sa_convert.observe.in_blocks import Attending
from sa_convert.observe.turning import Turning
from sa_convert.treatments.registry import used_in
from sa_convert.treatments.trial import Trial, Turned

NAME = "sa_convert_probe"
"""Of our attention function in the attention interface of transformers."""

Loans = dict[int, torch.Tensor | Call]
"""What layers have left for later ones: probabilities (B, H, T, S), or the call that they are computed from."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One layer's attention in one forward pass.

    probabilities: (B, H, T, T) of the layer's own heads; used: the same, as a plan changes them; value: (B, G, T, D);
    output: (B, T, H, D), used times value. query: (B, H, T, D), scaled; key: (B, G, T, D); their products are scores.
    """

    layer: int
    probabilities: torch.Tensor
    used: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class SeenInBlocks:
    """The same of a long sequence: its probabilities are computed when they are asked for, some queries at a time.

    value: (B, G, T, D). output: (B, T, H, D). blocks: gives the number of the first query of each block, and what each
    head's queries of it attend to, (B, H, queries, keys up to the last of them), by the plan that is being tried.
    """

    layer: int
    value: torch.Tensor
    output: torch.Tensor
    blocks: Callable[[], Iterator[tuple[int, torch.Tensor]]]


@dataclass(frozen=True)
class Block:
    """One layer of the model, and the numbers of its attentions in the order in which they run."""

    module: Any
    attentions: tuple[int, ...]


class Probe:
    """Lets a base model run with its heads' attention observed, or changed as a plan has it.

    model: a base model of `family`, which keeps every weight. Afterwards it runs through our attention function; its
    results without a plan are those of eager attention. attentions: the attention module of every layer as layers are
    numbered, None if there is none; output_projections: likewise. blocks: the layers as they run.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family
        self.attentions: list[Any] = []
        self.output_projections: list[Any] = []
        self.blocks: list[Block] = []
        self._trials: tuple[Trial, ...] = ()
        self._lenders: frozenset[int] = frozenset()
        self._observer: Callable[[Any], None] | None = None
        self._loans: Loans = {}
        self._keep_probabilities = True
        self._in_blocks = False
        self._touched: frozenset[int] = frozenset()
        # What transformers itself runs by scaled dot product attention, if it is asked to.
        self._like_sdpa = family.modules.interface and not family.modules.sinks and _supports_sdpa(model)
        self._causal: list[bool] = []
        self._turning = Turning(model, family)
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
                self._causal.append(stack.caches and not stack.cross)
                self._turning.add(attention)
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
    def trying(self, plan: Plan) -> Iterator[None]:
        """While open, attention is changed as this plan has it."""
        before = self._trials, self._lenders, self._touched
        self._touched = frozenset(plan.layers)
        self._trials = tuple(treatment.trial(plan) for treatment in used_in(plan))
        self._lenders = frozenset(layer for trial in self._trials for layer in trial.lenders)
        whole = [(trial, layer) for trial in self._trials for layer in trial.whole_layers]
        handles = [
            self.attentions[layer].register_forward_hook(_changing(partial(trial.output, layer)), with_kwargs=True)
            for trial, layer in whole
        ]
        try:
            yield
        finally:
            self._trials, self._lenders, self._touched = before
            for handle in handles:
                handle.remove()

    @contextmanager
    def watching(
        self, layers: Iterable[int], take: Callable[[int, torch.Tensor, torch.Tensor], None]
    ) -> Iterator[None]:
        """While open, `take` gets the number of each of these layers, what goes into its attention module and what that
        puts out, (B, T, hidden) both."""
        handles = [
            self.attentions[layer].register_forward_hook(_changing(partial(take, layer)), with_kwargs=True)
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def in_blocks(self) -> Iterator[None]:
        """While open, attention is computed some queries at a time, and no probabilities are kept: for long sequences.
        An observer sees each layer as `SeenInBlocks`."""
        before, self._in_blocks = self._in_blocks, True
        try:
            yield
        finally:
            self._in_blocks = before

    @contextmanager
    def observing(self, observer: Callable[[Any], None]) -> Iterator[None]:
        """While open, `observer` is called for every layer that attends, with what it has `Seen`."""
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    @contextmanager
    def lending(self, loans: Loans) -> Iterator[None]:
        """While open, layers that run one by one find and leave what later ones ask for in `loans`, as queries and
        keys, which take less memory than probabilities."""
        before, self._loans, self._keep_probabilities = self._loans, loans, False
        try:
            yield
        finally:
            self._loans, self._keep_probabilities = before, True

    def attend(self, call: Call, value: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The output (B, T, H, D) of one layer, as the plan has it and told to the observer."""
        layer = call.module.sa_convert_layer
        for trial in self._trials:
            key = trial.key(layer, call.key, self.turner(layer))
            call, value = replace(call, key=key), trial.value(layer, value)
        if self._in_blocks:
            return self._attend_in_blocks(call, value), None
        used = probabilities = call.probabilities()
        if layer in self._lenders:
            self._loans[layer] = probabilities if self._keep_probabilities else call.lasting()
        lent = cache(self._lent)
        for trial in self._trials:
            used = trial.probabilities(layer, used, lent, value.shape[1])
        batch, total, tokens, length = used.shape
        grouped = used.reshape(batch, value.shape[1], -1, length)
        output = torch.matmul(grouped, value).view(batch, total, tokens, -1).transpose(1, 2)
        if self._observer is not None:
            query = call.query * (call.arguments.get("scaling") or call.query.shape[-1] ** -0.5)
            seen = {"probabilities": probabilities, "used": used, "value": value, "output": output}
            self._observer(Seen(layer=layer, **seen, query=query, key=call.key))
        return output.contiguous(), None

    def _attend_in_blocks(self, call: Call, value: torch.Tensor) -> torch.Tensor:
        """The output (B, T, H, D)."""
        layer = call.module.sa_convert_layer
        if layer in self._lenders:
            self._loans[layer] = call.lasting()
        lent = {lender: loan for lender, loan in self._loans.items() if isinstance(loan, Call)}
        causal, groups = self._causal[layer], value.shape[1]
        plain = self._like_sdpa and layer not in self._touched
        attending = Attending(call, layer, self._trials, lent, causal=causal, groups=groups, plain=plain)
        output = attending.output(value)
        if self._observer is not None:
            blocks = attending.all_probabilities
            self._observer(SeenInBlocks(layer=layer, value=value, output=output, blocks=blocks))
        return output

    def turner(self, layer: int) -> Turned:
        """Turns keys of a layer by position as in the pass that runs, or that has run last."""
        return partial(self._turning.turned, layer)

    def _lent(self, layer: int) -> torch.Tensor:
        loan = self._loans[layer]
        return loan.probabilities() if isinstance(loan, Call) else loan


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any) -> Any:
    if not hasattr(module, "sa_convert_probe"):  # such as an image encoder's
        return eager_of(module)(module, query, key, value, attention_mask, **arguments)
    call = Call(module=module, query=query, key=key, mask=attention_mask, arguments=arguments)
    return module.sa_convert_probe.attend(call, value)


def _changing(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]) -> Callable[..., Any]:
    """Changes what an attention module puts out, unless `change` gives None. In some families that holds the residual,
    too."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        kind = type(module)
        if kind.__name__.startswith(own_attention.PROBED):  # its own forward takes anything
            kind = kind.__bases__[1]
        names = list(signature(kind.forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        residual = given.get("residual", 0)
        changed = change(given[names[0]], output[0] - residual)
        return None if changed is None else (changed + residual, *output[1:])

    return hook


def _submodule(model: Any, path: str) -> Any:
    """A part of a model by its path in a language model."""
    from sa_convert.runtime.modeling_shared_attention import path_in

    return model.get_submodule(path_in(model, path) or path)


def _supports_sdpa(model: Any) -> bool:
    """Of the model and of all models in it."""
    from transformers import PreTrainedModel

    return all(module._supports_sdpa for module in model.modules() if isinstance(module, PreTrainedModel))


def _has_stack(model: Any, family: Family, stack: Stack) -> bool:
    """An encoder may stand alone."""
    from sa_convert.runtime.modeling_shared_attention import path_in

    return not family.encoder_decoder or path_in(model, stack.layers) is not None
