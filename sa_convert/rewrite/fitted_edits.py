"""Fitted tensors on their way into the written shards."""

from collections.abc import Mapping
from pathlib import Path

from sa_convert.domain.checkpoint import TensorEdit
from sa_convert.domain.fitted import Fitted
from sa_convert.read.header import read_shard


def fitted_edits(fitted: Fitted, file: Path) -> Mapping[str, TensorEdit]:
    """Store the tensors in `file`, and return the edits that put them into the converted model."""
    from safetensors.torch import save_file

    if not fitted.tensors:
        return {}
    save_file({name: tensor.contiguous() for name, tensor in fitted.tensors.items()}, file)
    return {
        tensor.name: TensorEdit(replacement=tensor, after=fitted.after.get(tensor.name))
        for tensor in read_shard(file).tensors
    }
