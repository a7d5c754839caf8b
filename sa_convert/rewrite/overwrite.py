"""Writes new bytes over tensors of files that are ours: same names, dtypes and shapes, so nothing else moves."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.rewrite.ranges import write_at

if TYPE_CHECKING:
    import torch


def overwrite_tensors(checkpoint: Checkpoint, folder: Path, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Put these tensors, by name, into the files of `folder`, which are copies of the checkpoint's.

    Raises ValueError for a tensor of another size, OSError if the files cannot be written.
    """
    import torch

    for shard in checkpoint.shards:
        changed = [entry for entry in shard.tensors if entry.name in tensors]
        if not changed:
            continue
        with (folder / shard.file.relative_to(checkpoint.folder)).open("r+b") as file:
            for entry in changed:
                data = tensors[entry.name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                if len(data) != entry.bytes:
                    raise ValueError(f"'{entry.name}' has {entry.bytes} bytes in the file, and {len(data)} now")
                write_at(file.fileno(), entry.start, data)
