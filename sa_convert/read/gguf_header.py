"""The header of a .gguf file: its metadata, and where its tensors are. Tokenizer and tensor data are skipped."""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sa_convert.errors import CheckpointError, UnsupportedModelError

REMAKE = "make the file anew with convert_hf_to_gguf.py of llama.cpp"
FOLDER = "convert the model's folder with safetensors"
"""What to do about a file that contradicts itself, and about one that tells what cannot be read from it."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4  # of ggml
_TOKENIZER = "tokenizer."

_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Format characters of struct, by the type number of a metadata value."""

_FLOATS = {0: "f", 1: "e"}
"""Format characters of the ggml types that hold plain numbers, by type number: float32 and float16."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. shape: as torch has it, rows first. kind: the number of its ggml type. start, stop: bytes in the
    file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """metadata: values by their keys; of the tokenizer's arrays, only their lengths. tensors: by name."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def own(self) -> dict[str, Any]:
        """The metadata of the architecture, without its name: "rope.freq_base" for "llama.rope.freq_base"."""
        start = f"{self.architecture}."
        return {key.removeprefix(start): value for key, value in self.metadata.items() if key.startswith(start)}

    def numbers(self, name: str) -> list[float]:
        """The values of a small tensor of float32 or float16. Raises UnsupportedModelError if it is of another type."""
        tensor = self.tensors[name]
        if tensor.kind not in _FLOATS:
            raise UnsupportedModelError(
                f"{self.file}: '{name}' is of ggml type {tensor.kind}, not plain floats, so its values are not known; "
                f"{FOLDER}."
            )
        with self.file.open("rb") as stream:
            stream.seek(tensor.start)
            data = stream.read(tensor.stop - tensor.start)
        return list(struct.unpack(f"<{prod(tensor.shape)}{_FLOATS[tensor.kind]}", data))


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of a file.

    Raises CheckpointError for a file that is damaged or cut, UnsupportedModelError for a version or a type of numbers
    that cannot be read.
    """
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise CheckpointError(f"{file}: is not a GGUF file, or damaged; download it again.")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(file, data).header()


class _Reader:
    """Reads forward through the bytes of one file."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, len(_MAGIC)

    def header(self) -> GgufHeader:
        version = self.scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in _VERSIONS
            what = "was written for big-endian machines" if swapped else f"is of GGUF version {version}"
            raise UnsupportedModelError(f"{self.file}: {what}, which transformers does not read; {REMAKE}.")
        tensors, keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name()
            if key in metadata:
                raise self.damaged(f"the key '{key}' is there twice")
            metadata[key] = self.value(self.scalar("I"), key)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or not architecture.isprintable():
            raise self.damaged("it does not name its architecture (general.architecture)")
        return GgufHeader(self.file, metadata, self.tensors(tensors, metadata.get("general.alignment", _ALIGNMENT)))

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.damaged(f"the key '{key}' has a value of the unknown type {kind}")
        value = self.scalar(_SCALARS[kind])
        return _decimal(value) if kind == _FLOAT32 else value

    def array(self, key: str) -> Any:
        """A list of values; of strings and of the tokenizer's arrays, how many they are."""
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.scalar("Q"))
            return length
        if kind not in _SCALARS:
            raise self.damaged(f"the key '{key}' has an array of the unknown type {kind}")
        start = self.at
        self.skip(length * struct.calcsize(_SCALARS[kind]))
        if key.startswith(_TOKENIZER):
            return length
        return list(struct.unpack_from(f"<{length}{_SCALARS[kind]}", self.data, start))

    def tensors(self, count: int, alignment: Any) -> dict[str, GgufTensor]:
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(count):
            name, dimensions = self.name(), self.scalar("I")
            if dimensions > _MOST_DIMENSIONS:
                raise self.damaged(f"the tensor '{name}' has {dimensions} dimensions")
            # ggml names the dimension that runs fastest first, torch last.
            shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
            found.append((name, shape, self.scalar("I"), self.scalar("Q")))
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, no power of two")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in found:
            if kind not in sizes:
                raise UnsupportedModelError(
                    f"{self.file}: '{name}' is of ggml type {kind}, which the installed gguf package does not know; "
                    "install a newer one, or use a file of another quantisation."
                )
            if name in tensors:
                raise self.damaged(f"the tensor '{name}' is there twice")
            elements, block = sizes[kind]
            if shape and shape[-1] % elements:
                raise self.damaged(f"rows of '{name}' have {shape[-1]} numbers, which are no whole blocks")
            stop = start + offset + prod(shape) // elements * block
            if stop > len(self.data):
                raise CheckpointError(
                    f"{self.file}: is cut: '{name}' ends at byte {stop:,}, and the file has {len(self.data):,}; "
                    "download it again."
                )
            tensors[name] = GgufTensor(name, shape, kind, start + offset, stop)
        return tensors

    def scalar(self, form: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from(f"<{form}", self.data, start)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.at
        self.skip(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"the text at byte {start:,} is no UTF-8") from None

    def name(self) -> str:
        """Of a key or a tensor, which messages quote: no line breaks and the like."""
        start, found = self.at, self.string()
        if not found.isprintable():
            raise self.damaged(f"the name at byte {start:,} is no plain text")
        return found

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise CheckpointError(f"{self.file}: is cut or damaged: its header does not end; download it again.")

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: is damaged: {what}; download it again.")


def _decimal(value: float) -> float:
    """The shortest decimal number that the float32 `value` stands for: 1e-6 for 9.99999997e-07."""
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short))[0] == value:
            return short
    return value
