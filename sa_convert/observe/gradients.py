"""What a change of a head's output does to the loss, or to the layer's output if gradients do not fit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from sa_convert.domain.calibrated import Measure
from sa_convert.domain.plan import Plan
from sa_convert.models.arguments import first_argument
from sa_convert.observe.finite import not_finite
from sa_convert.observe.probe import Probe, Seen
from sa_convert.observe.sequences import Sample

Gradients = dict[int, torch.Tensor]


def fisher_gradients(
    probe: Probe, sample: Sample, plan: Plan, observe: Callable[[Seen], None], generator: torch.Generator
) -> Iterator[tuple[str, Gradients]]:
    """Gradients (T, H, D) for each layer: of the divergence from the base under a plan, then of sampled labels."""
    model, seen = probe.model, {}
    inputs = sample.inputs(model)

    def note(layer: Seen) -> None:
        # The model's weights have no gradients: the graph begins at the first attention of each stack.
        if not layer.output.requires_grad:
            layer.output.requires_grad_(True)
        observe(layer)
        seen[layer.layer] = layer.output

    base = None
    if plan:
        with torch.no_grad():
            base = functional.log_softmax(inputs.logits(model)[0].float(), dim=-1)
    with torch.enable_grad(), probe.trying(plan), probe.observing(note):
        chances = functional.log_softmax(inputs.logits(model)[0].float(), dim=-1)  # (P, vocabulary)
        if not bool(torch.isfinite(chances.sum())):
            raise not_finite(model)
        scored = inputs.scored[0].to(chances.device)
        drawn = torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator).to(chances.device)
        losses = [("second", -chances.gather(1, drawn)[:, 0][scored].sum())]
        if base is not None:
            divergence = functional.kl_div(chances, base, log_target=True, reduction="none").sum(-1)
            losses.insert(0, ("first", divergence[scored].sum()))
        for at, (order, loss) in enumerate(losses):
            outputs = list(seen.values())
            gradients = torch.autograd.grad(
                loss, outputs, retain_graph=at + 1 < len(losses), materialize_grads=True
            )  # what a plan puts something else in the place of has none
            yield order, {layer: gradient[0].cpu() for layer, gradient in zip(seen, gradients, strict=True)}


def output_directions(
    probe: Probe,
    sample: Sample,
    plan: Plan,
    observe: Callable[[Seen], None],
    generator: torch.Generator,
    seen: dict[int, Seen],
) -> Iterator[tuple[str, Gradients]]:
    """Random directions (T, H, D) for each layer, so that the mean square of e is the relative squared output error."""
    gradients: Gradients = {}
    sizes: dict[int, float] = {}

    def cut(index: int) -> Callable[..., Any]:
        """Before a layer: forget the graph of earlier ones, and note the size of the residual stream."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, name = first_argument(module, args, kwargs)
            sizes[index] = float(hidden.detach().float().square().sum(-1).mean().sqrt())
            if name is None:
                return (hidden.detach(), *args[1:]), kwargs
            return args, {**kwargs, name: hidden.detach()}

        return hook

    def direct(index: int) -> Callable[..., None]:
        """After the output projection: what a random direction of its output is at the head outputs."""

        def hook(_: Any, args: Any, output: torch.Tensor) -> None:
            if not bool(torch.isfinite(output.sum())):
                raise not_finite(probe.model, f" in layer {index}")
            z = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            (direction,) = torch.autograd.grad(output, seen[index].output, z)
            gradients[index] = direction[0].float().cpu() / max(sizes[index], 1e-12)
            # The output projection is the last to need the graph.
            seen[index] = replace(seen[index], **{name: _detached(value) for name, value in vars(seen[index]).items()})

        return hook

    hooks = []
    for block in probe.blocks:
        for index in block.attentions:
            hooks.append(block.module.register_forward_pre_hook(cut(index), with_kwargs=True))
            hooks.append(probe.output_projections[index].register_forward_hook(direct(index)))

    def note(layer: Seen) -> None:
        layer.output.requires_grad_(True)
        observe(layer)

    try:
        with torch.enable_grad(), probe.trying(plan), probe.observing(note):
            # Without the language-modelling head, if the model has one that can be left out.
            probe.model.base_model(**sample.inputs(probe.model).kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    yield "second", gradients


def pass_over(probe: Probe, sample: Sample, generator: torch.Generator, measure: Measure) -> None:
    """Draw what a pass over this sequence would, which another process runs: so draws do not depend on who runs it.

    Models whose logits or states have another shape than most draw other numbers, which are as good.
    """
    tokens, size = probe.model.get_input_embeddings().weight.shape
    if measure == "fisher":
        # As multinomial draws one label each.
        torch.empty(sample.inputs(probe.model).labels.shape[1], tokens).exponential_(generator=generator)
        return
    for _ in probe.order():
        torch.randn(1, len(sample.tokens), size, generator=generator)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
