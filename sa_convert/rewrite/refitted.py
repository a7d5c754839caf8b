"""Refitted matrices on their way into the written shards, in the dtype of the tensors that they replace."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import FLOATS, TensorEdit
from sa_convert.domain.model import Model
from sa_convert.errors import CheckpointError
from sa_convert.read.header import read_shard
from sa_convert.read.names import output_name

if TYPE_CHECKING:
    import torch


def check_refittable(model: Model) -> None:
    """Raises CheckpointError if the output projections are not plain float tensors, as in quantised models."""
    checkpoint = model.checkpoint
    for layer in (index for index, attention in enumerate(model.geometry.layers) if attention.heads):
        name = output_name(model, layer)
        if name not in checkpoint.tensors or checkpoint.tensors[name].dtype not in FLOATS:
            dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "missing"
            raise CheckpointError(
                f"{checkpoint.identity}: the output projection '{name}' is {dtype}, which cannot be refitted: convert "
                "the unquantised model, or write refit: none in the recipe."
            )


def refit_edits(model: Model, changes: "Mapping[int, torch.Tensor]", file: Path) -> dict[str, TensorEdit]:
    """Add changes (output, input) by layer to the base's matrices, store them in `file`, and return the edits that put
    them into the converted model."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    stored = {}
    for layer, change in changes.items():
        tensor = model.checkpoint.tensors[output_name(model, layer)]
        with safe_open(tensor.file, framework="pt") as shard:
            base = shard.get_tensor(tensor.name).float()
        change = change.T if model.family.modules.transposed else change
        stored[tensor.name] = (base + change).to(getattr(torch, FLOATS[tensor.dtype])).contiguous()
    if not stored:
        return {}
    save_file(stored, file)
    return {tensor.name: TensorEdit(replacement=tensor) for tensor in read_shard(file).tensors}
