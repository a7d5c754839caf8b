"""Tensors that are at hand, or that a model would have, described as if they lay in a safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.checkpoint import Shard, TensorEntry
from sa_convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch

METADATA = {"format": "pt"}
"""What transformers writes into the header of a safetensors file."""


def described_model(file: Path, model: Any) -> Shard:
    """The shard that transformers would save of a model (on the meta device, too), as if it were `file`."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(model.state_dict()) - set(dict(model.named_parameters())) - set(dict(model.named_buffers()))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return described(file, revert_weight_conversion(model, state))


def described(file: Path, state: Mapping[str, "torch.Tensor"]) -> Shard:
    """The shard that these tensors (of any device, meta too) would make, as if it were `file`."""
    start, entries = 0, []
    for name, tensor in state.items():
        stop = start + tensor.nelement() * tensor.element_size()
        entries.append(TensorEntry(name, _dtype(file, name, tensor), tuple(tensor.shape), file, start, stop))
        start = stop
    return Shard(file, tuple(entries), METADATA)


def _dtype(file: Path, name: str, tensor: "torch.Tensor") -> str:
    """A tensor's dtype in the words of safetensors. Raises CheckpointError if it has none."""
    import torch

    words = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
        torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
        torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    }  # fmt: skip
    if tensor.dtype not in words:
        raise CheckpointError(f"{file}: tensor '{name}' has the dtype {tensor.dtype}, which safetensors does not know.")
    return words[tensor.dtype]
