"""What a checkpoint holds, as its headers tell; and what a conversion does to each tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What torch calls the dtypes that weights can be computed with and written again in."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: dtype in the words of safetensors; `start:stop` is its byte range in `file`, a path."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, and its `__metadata__`."""

    file: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A model in a folder, read from config.json and safetensors headers alone.

    identity: what the user called it. revision: the commit on the Hub, or None. index: the parsed
    `model.safetensors.index.json`, or None for a single file. side_files: every other file that belongs to the model
    (tokenizer, generation config, license, ...), relative to the folder, weights of other formats left out. code: its
    Python files, relative to the folder. trusted: the user lets them run; they are never run or copied otherwise.

    absent: bytes of the files that are not in the folder yet, by path relative to it: those of the model `identity` on
    the Hub at `revision`, whose folder is that of the snapshot in the cache. Empty for a model that is all here.

    notes: what of the files is passed over, one sentence each, for the user to read.
    """

    identity: str
    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None
    side_files: tuple[Path, ...]
    revision: str | None = None
    code: tuple[Path, ...] = ()
    trusted: bool = False
    absent: Mapping[Path, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def size(self, path: Path) -> int:
        """Bytes of a file, which may be absent yet. path: relative to the folder."""
        return self.absent[path] if path in self.absent else (self.folder / path).stat().st_size

    @property
    def is_safetensors(self) -> bool:
        """Whether the weights need not be written as safetensors first."""
        return all(shard.file.suffix == ".safetensors" for shard in self.shards)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files, or of the tensors if the files have another format."""
        if self.is_safetensors:
            return sum(self.size(shard.file.relative_to(self.folder)) for shard in self.shards)
        return sum(tensor.bytes for tensor in self.tensors.values())

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules that have a tensor of their own: names without their last part."""
        return frozenset(name.rpartition(".")[0] for name in self.tensors)

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


@dataclass(frozen=True)
class TensorEdit:
    """What happens to one tensor, by its name. A tensor without an edit is copied as it is.

    rows: ranges (start, stop) along `axis` that stay, in the order that the new tensor has them in, which need not be
    ascending; no two overlap. Empty: the tensor is dropped; None: all of it stays. axis: 0, or 1 for columns of a
    matrix. name: its new name, or None to keep it. replacement: a tensor of any dtype and shape that takes its place;
    rows do not apply to it. after: of a tensor that the base does not have, the one of the base that it follows; such
    an edit has a replacement.
    """

    rows: tuple[tuple[int, int], ...] | None = None
    name: str | None = None
    replacement: TensorEntry | None = None
    axis: int = 0
    after: str | None = None

    @property
    def drops(self) -> bool:
        return self.rows == ()

    def shape(self, tensor: TensorEntry) -> tuple[int, ...]:
        """Shape of the tensor after the edit."""
        if self.replacement is not None:
            return self.replacement.shape
        if self.rows is None:
            return tensor.shape
        kept = sum(stop - start for start, stop in self.rows)
        return (*tensor.shape[: self.axis], kept, *tensor.shape[self.axis + 1 :])
