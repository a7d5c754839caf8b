"""Refitted matrices on their way into the written shards, in the dtype of the tensors that they replace."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.data.checkpoint import Checkpoint, TensorEdit
from sa_convert.errors import CheckpointError
from sa_convert.export.shared_attention_families import Family
from sa_convert.read.geometry import attention_prefix
from sa_convert.read.header import read_shard

if TYPE_CHECKING:
    import torch

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def output_tensor(checkpoint: Checkpoint, family: Family, layer: int) -> str:
    """Name of the weight of a layer's output projection."""
    return f"{attention_prefix(checkpoint, family, layer)}{family.output}.weight"


def check_refittable(checkpoint: Checkpoint, family: Family, layers: int) -> None:
    """Raises CheckpointError where the output projections are not plain float tensors, as in quantised models."""
    for layer in range(layers):
        name = output_tensor(checkpoint, family, layer)
        if name not in checkpoint.tensors or checkpoint.tensors[name].dtype not in _DTYPES:
            found = checkpoint.tensors[name].dtype if name in checkpoint.tensors else "missing"
            raise CheckpointError(
                f"{checkpoint.identity}: the output projection '{name}' is {found}, which cannot be refitted: convert "
                "the unquantised model, or write refit: none in the recipe."
            )


def refit_edits(
    checkpoint: Checkpoint, family: Family, changes: "Mapping[int, torch.Tensor]", file: Path
) -> dict[str, TensorEdit]:
    """Add changes (output, input) by layer to the base's matrices, store them in `file`, and return the edits that put
    them into the converted model."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    stored = {}
    for layer, change in changes.items():
        tensor = checkpoint.tensors[output_tensor(checkpoint, family, layer)]
        with safe_open(tensor.file, framework="pt") as shard:
            base = shard.get_tensor(tensor.name).float()
        stored[tensor.name] = (base + change).to(getattr(torch, _DTYPES[tensor.dtype])).contiguous()
    if not stored:
        return {}
    save_file(stored, file)
    return {tensor.name: TensorEdit(replacement=tensor) for tensor in read_shard(file).tensors}
