"""Passes over one sequence that start at a later layer, from what the base model's layers before it put out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sa_convert.domain.plan import Plan
from sa_convert.observe.probe import Probe
from sa_convert.observe.sequences import Sample


class Resumed:
    """The base model's output of every layer for one sequence, and its predictions.

    probe: runs the unchanged base model when this is made.
    """

    def __init__(self, probe: Probe, sample: Sample) -> None:
        self.probe, self.sample = probe, sample
        self._outputs: list[Any] = []
        hooks = [block.module.register_forward_hook(self._note) for block in probe.blocks]
        try:
            self.base = self._chances(Plan())
        finally:
            for hook in hooks:
                hook.remove()

    def divergence(self, plan: Plan) -> float:
        """KL(base || model under the plan), in nats a scored token. Layers before the first that is treated are not
        run."""
        with self._skipping(min(plan.layers)):
            chances = self._chances(plan)
        return float((self.base.exp() * (self.base - chances)).sum(-1).double().mean())

    def _note(self, module: Any, args: Any, output: Any) -> None:
        self._outputs.append(output)

    def _chances(self, plan: Plan) -> torch.Tensor:
        """Log-probabilities (scored tokens, vocabulary)."""
        with torch.inference_mode(), self.probe.trying(plan), self.probe.in_blocks():
            inputs = self.sample.inputs(self.probe.model)
            ((predictions, _),) = inputs.scored_logits(inputs.logits(self.probe.model))
            return torch.log_softmax(predictions.float(), dim=-1)

    @contextmanager
    def _skipping(self, layer: int) -> Iterator[None]:
        """While open, layers before the one with this attention return what they did for the base."""
        skipped = []
        for block, output in zip(self.probe.blocks, self._outputs, strict=True):
            if layer in block.attentions:
                break
            skipped.append(block.module)
            own = block.module.__dict__.get("forward")
            block.module.forward = _Again(output, own)
        try:
            yield
        finally:
            for module in skipped:
                own = module.forward.own
                del module.forward
                if own is not None:  # such as that of a hook which fetches weights
                    module.forward = own


class _Again:
    """A layer's forward that returns what it has returned before. own: the one that was set on the module itself."""

    def __init__(self, output: Any, own: Any) -> None:
        self.output, self.own = output, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
