"""Refitted matrices on their way into the written shards, in the dtype of the tensors that they replace."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import Checkpoint, TensorEdit
from sa_convert.domain.geometry import ModelGeometry
from sa_convert.domain.stacks import Stacks
from sa_convert.errors import CheckpointError
from sa_convert.families.family import Family
from sa_convert.read.header import read_shard
from sa_convert.read.names import output_name

if TYPE_CHECKING:
    import torch

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def check_refittable(checkpoint: Checkpoint, family: Family, geometry: ModelGeometry) -> None:
    """Raises CheckpointError where the output projections are not plain float tensors, as in quantised models."""
    for layer in (index for index, attention in enumerate(geometry.layers) if attention.heads):
        name = output_name(checkpoint, family, geometry.stacks, layer)
        if name not in checkpoint.tensors or checkpoint.tensors[name].dtype not in _DTYPES:
            found = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "missing"
            raise CheckpointError(
                f"{checkpoint.identity}: the output projection '{name}' is {found}, which cannot be refitted: convert "
                "the unquantised model, or write refit: none in the recipe."
            )


def refit_edits(
    checkpoint: Checkpoint, family: Family, stacks: Stacks, changes: "Mapping[int, torch.Tensor]", file: Path
) -> dict[str, TensorEdit]:
    """Add changes (output, input) by layer to the base's matrices, store them in `file`, and return the edits that put
    them into the converted model."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    stored = {}
    for layer, change in changes.items():
        tensor = checkpoint.tensors[output_name(checkpoint, family, stacks, layer)]
        with safe_open(tensor.file, framework="pt") as shard:
            base = shard.get_tensor(tensor.name).float()
        change = change.T if family.modules.transposed else change
        stored[tensor.name] = (base + change).to(getattr(torch, _DTYPES[tensor.dtype])).contiguous()
    if not stored:
        return {}
    save_file(stored, file)
    return {tensor.name: TensorEdit(replacement=tensor) for tensor in read_shard(file).tensors}
