"""Which tensors of a converted model train, and which parameters of the running model they are."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from sa_convert.domain.checkpoint import FLOATS, Checkpoint, TensorEntry
from sa_convert.domain.heal_settings import HealSettings
from sa_convert.domain.model import Model
from sa_convert.domain.plan import Plan
from sa_convert.errors import CheckpointError, SaConvertError
from sa_convert.read.names import attention_prefix, layers_prefix, output_name, projection, stack_of
from sa_convert.treatments.registry import lenders

SCALE = 2
"""Of low-rank additions."""


def trained_tensors(converted: Model, base: Checkpoint, plan: Plan, settings: HealSettings) -> tuple[str, ...]:
    """Names, in the converted files, of the tensors that train, in the order of the files.

    "outputs": values and outputs of changed layers, queries and keys of heads that lend, and what a treatment added;
    "layers" and "lora": all tensors of changed layers; "model": of all layers. Raises CheckpointError if there are
    none, or one is quantised.
    """
    checkpoint, family = converted.checkpoint, converted.family
    whole = tuple(f"{_layer_prefix(converted, layer)}." for layer in plan.layers)
    starts: tuple[str, ...]
    if settings.train == "outputs":
        sides = dict.fromkeys(plan.layers, ("value",))
        sides |= {
            lender: (*sides.get(lender, ()), "query", "key") for _, (lender, _) in lenders(plan, converted.geometry)
        }
        starts = tuple(
            f"{attention_prefix(converted, layer)}{projection(family, side)}."
            for layer, named in sides.items()
            for side in named
        )
        starts += tuple(f"{output_name(converted, layer).removesuffix('weight')}" for layer in plan.layers)
    else:
        starts = whole if settings.train != "model" else tuple(_layers(converted))
    names = [
        name
        for name in checkpoint.tensors
        if name.startswith(starts) or (name.startswith(whole) and name not in base.tensors)
    ]
    if not names:
        raise CheckpointError(
            f"{checkpoint.identity}: the changed layers have no values and outputs left to train: use --train layers."
        )
    for name in names:
        if checkpoint.tensors[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{checkpoint.identity}: tensor '{name}' is {checkpoint.tensors[name].dtype}, which cannot be trained: "
                "heal the unquantised model."
            )
    return tuple(names)


def _layers(model: Model) -> Iterator[str]:
    """How the names of each layer's tensors begin."""
    return (f"{_layer_prefix(model, layer)}." for layer in range(len(model.geometry.layers)))


def _layer_prefix(model: Model, layer: int) -> str:
    stack, number = stack_of(model.family, model.geometry.stacks, layer)
    return f"{layers_prefix(model.checkpoint, model.family, stack)}.{number}"


@dataclass(frozen=True)
class Trained:
    """tensors: name in the files of each parameter that trains, by its name in the model; of `lora`, the tensors that
    its additions go to, by the name of the module. lora: whether it is that."""

    tensors: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    lora: bool

    def changed(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the files hold after healing, by name and in the dtype of the files: of the tensors that differ.

        state: as `trained_state` gave it.
        """
        found = {}
        for own, name in self.tensors.items():
            entry = self.entries[name]
            stored = read_tensor(entry)
            if self.lora:
                first, second = (state[f"{own}.lora_{part}.default.weight"] for part in "AB")
                value = stored.float() + SCALE * (second @ first)
            else:
                value = state[own]
            value = value.to(getattr(torch, FLOATS[entry.dtype])).contiguous()
            if not torch.equal(value, stored):
                found[name] = value
        return found


def prepare(student: Any, converted: Checkpoint, names: Iterable[str], settings: HealSettings) -> Trained:
    """Let these tensors of a loaded student train and nothing else.

    Tensors that the running model holds in another form than the files (experts that are stacked as they are loaded)
    stay as they are. Raises CheckpointError if none is left.
    """
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    parameters = dict(student.named_parameters())
    found = {}
    for name in names:
        own = _own_name(student, parameters, converted.tensors[name])
        if own is not None:
            found[own] = name
    if settings.train == "lora":
        return _with_additions(student, converted, found, settings)
    if not found:
        raise CheckpointError(f"{converted.identity}: the running model holds none of the tensors that should train.")
    for own, name in found.items():
        parameters[own].requires_grad_(True)
        stored = read_tensor(converted.tensors[name])  # as precise as it is there, whatever the model computes in
        parameters[own].data = stored.to(parameters[own].device, torch.float32)
    return Trained(found, {name: converted.tensors[name] for name in found.values()}, False)


def _own_name(student: Any, parameters: Mapping[str, Any], entry: TensorEntry) -> str | None:
    """The parameter that holds this tensor as it is in the file."""
    prefix = f"{student.base_model_prefix}."
    tails = (entry.name, prefix + entry.name, entry.name.removeprefix(prefix))
    for own in dict.fromkeys(tails):
        parameter = parameters.get(own)
        if parameter is not None and tuple(parameter.shape) == entry.shape:
            stored = read_tensor(entry).to(parameter.device, parameter.dtype)
            if torch.equal(stored, parameter.detach()):
                return own
    return None


def _with_additions(student: Any, converted: Checkpoint, found: Mapping[str, str], settings: HealSettings) -> Trained:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SaConvertError("Training low-rank additions needs an extra: pip install 'sa-convert[lora]'.") from error
    modules = dict(student.named_modules())
    targets = {
        own.removesuffix(".weight"): name
        for own, name in found.items()
        if own.endswith(".weight") and isinstance(modules.get(own.removesuffix(".weight")), torch.nn.Linear)
    }
    if not targets:
        raise CheckpointError(f"{converted.identity}: the changed layers have no linear maps for low-rank additions.")
    config = LoraConfig(
        r=settings.rank, lora_alpha=SCALE * settings.rank, lora_dropout=0.0, target_modules=list(targets), bias="none"
    )
    torch.manual_seed(settings.seed)
    inject_adapter_in_model(config, student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return Trained(targets, {name: converted.tensors[name] for name in targets.values()}, True)


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """All that trains in a `Distilled` model, by its name in the student, whole and on the CPU.

    Every process has to ask for it at the same time.
    """
    return {
        name.removeprefix("student.").replace("_checkpoint_wrapped_module.", ""): _whole(parameter)
        .detach()
        .cpu()
        .clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """From its file."""
    with safe_open(entry.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(entry.name)
    return tensor


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter of which this process may hold a part."""
    gather = getattr(parameter, "full_tensor", None)
    whole: torch.Tensor = parameter if gather is None else gather()
    return whole
