"""Where a model runs, in which dtype, and whether it fits there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa_convert.domain.checkpoint import FLOATS
from sa_convert.domain.model import RunOptions
from sa_convert.errors import CheckpointError, SaConvertError
from sa_convert.models.auto_class import TASKS, auto_class_name
from sa_convert.models.processes import count, from_first, on_this_machine, own_device
from sa_convert.read.folder import read_config

if TYPE_CHECKING:
    import torch

HEADROOM = 0.8
"""The part of free memory that weights may take; activations and the cache need the rest."""

_POSITIONS = ("max_position_embeddings", "n_positions")


NO_MEMORY: Mapping[int | str, int] = {"cpu": 1}
"""Bounds with which all weights stay on the disk until their layer runs."""


@dataclass(frozen=True)
class Placement:
    """device: "cpu", "cuda", "cuda:1", "mps". dtype: of the computation. stored: dtype of the weights in the files.

    max_memory: bytes by device as accelerate takes it, or None if the whole model fits on `device`.
    """

    device: str
    dtype: "torch.dtype"
    stored: "torch.dtype"
    max_memory: Mapping[int | str, int] | None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def place(
    folder: Path,
    device: str = "auto",
    dtype: str = "auto",
    max_memory: Mapping[int | str, int] | None = None,
    *,
    processes: int = 1,
) -> Placement:
    """Decide where the checkpoint in `folder` runs.

    device: "auto" takes CUDA, then MPS, then the CPU. dtype: "auto" takes the dtype of the weights; on a CPU it takes
    float32 instead of float16, and instead of bfloat16 if that fits into memory (few CPUs are fast at either, and
    the decode check is stricter). max_memory: given, the model is always placed by accelerate within these bounds
    (`{"cpu": bytes}`), and what does not fit stays on disk; None: that is done only if the weights do not fit into
    free memory. processes: that share the memory of the CPU. Raises SaConvertError for a device or dtype that torch
    does not have.
    """
    import torch

    device = _device(device)
    stored = stored_dtype(folder)
    computed = stored if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(computed, torch.dtype) or not computed.is_floating_point:
        raise SaConvertError(f"{dtype} is not a dtype to compute in: use float32, bfloat16, float16 or auto.")
    fits = (
        HEADROOM * _free(device, processes) / weight_bytes(folder) * stored.itemsize
    )  # bytes that an element may have
    if dtype == "auto" and device == "cpu" and (computed == torch.float16 or fits >= torch.float32.itemsize):
        computed = torch.promote_types(computed, torch.float32)
    if max_memory is None and computed.itemsize > fits:
        max_memory = _bounds(device, processes)
    return Placement(device, computed, stored, max_memory)


def placed(folder: Path, run: RunOptions) -> Placement:
    """As `place`, by what the user asks for."""
    return place(folder, run.device, run.dtype, NO_MEMORY if run.layer_by_layer else None)


def placed_in_launch(folder: Path, run: RunOptions) -> Placement:
    """As `placed`, for one of several processes: its own GPU, or its part of the memory, and the dtype of all."""
    if count() == 1:
        return placed(folder, run)
    device = own_device(run.device)
    most = NO_MEMORY if run.layer_by_layer else None
    found = place(folder, device, run.dtype, most, processes=on_this_machine())
    # What is free may differ from process to process, and they must not do different work.
    dtype, fits = from_first(lambda: (found.dtype, found.max_memory is None))
    if fits:
        return replace(found, dtype=dtype, max_memory=None)
    return replace(found, dtype=dtype, max_memory=found.max_memory or _bounds(found.device, on_this_machine()))


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder; safetensors first, as transformers loads them."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := list(folder.glob(pattern)):
            return sum(file.stat().st_size for file in files)
    raise CheckpointError(f"{folder}: no weights (*.safetensors or pytorch_model*.bin).")


def stored_dtype(folder: Path) -> "torch.dtype":
    """Dtype of the weights: as config.json names it, else that of the first float tensor."""
    import torch
    from safetensors import safe_open

    config = read_config(folder)
    name = config.get("dtype") or config.get("torch_dtype")
    if isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                if dtype := FLOATS.get(tensors.get_slice(key).get_dtype()):
                    return getattr(torch, dtype)
    return torch.float32


def positions(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence that the model certainly has positions for, as far as its config limits them."""
    limit = most_positions(config)
    if limit is None or TASKS.get(auto_class_name(config)) != "masked-token":
        return limit
    # Some encoders (RoBERTa) count positions from behind the number of their padding token, 0 or 1.
    padding = config.get("pad_token_id")
    return limit - padding - 1 if padding in (0, 1) else limit


def most_positions(config: Mapping[str, Any]) -> int | None:
    """Positions that config.json names, of which the model may not use the first one or two."""
    text = config.get("text_config")
    keys = ("max_position_embeddings",) if config.get("is_encoder_decoder") else _POSITIONS
    limits = (level[key] for level in (config, text) if isinstance(level, dict) for key in keys if level.get(key))
    return int(limit) if (limit := next(limits, None)) else None


def usable_positions(model: Any) -> int | None:
    """Positions of a model that counts them from behind its padding token, or None."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for module in model.modules():
        if limit and getattr(module, "num_embeddings", None) == limit and module is not model.get_input_embeddings():
            padding = getattr(module, "padding_idx", None)
            if padding is not None:
                return int(limit) - int(padding) - 1
    return None


def _device(name: str) -> str:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise SaConvertError(f"Device {name} is not available here: {str(error).splitlines()[0]}") from error
    return name


def _free(device: str, processes: int = 1) -> int:
    """Bytes of free memory on a device, for each of several processes that share it."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes


def _bounds(device: str, processes: int = 1) -> dict[int | str, int]:
    """What accelerate may use: the device, then the CPU, then the disk."""
    bounds: dict[int | str, int] = {"cpu": int(HEADROOM * _free("cpu", processes))}
    if device != "cpu":
        import torch

        index: int | str = torch.device(device).index or 0 if device.startswith("cuda") else device
        bounds = {index: int(HEADROOM * _free(device)), **bounds}
    return bounds
