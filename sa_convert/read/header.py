"""The header of a safetensors file: which tensors it holds and where, without reading them."""

import json
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from sa_convert.domain.checkpoint import DTYPE_BITS, Shard, TensorEntry
from sa_convert.errors import CheckpointError
from sa_convert.read.characters import check_characters
from sa_convert.read.kinds import other_kind

LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer ones."""

PREFIX = 8
"""Bytes that tell the length of the header."""

_AGAIN = "the file is cut; download it again"
_NOT_VALID = "the safetensors library writes no such file: save the model again, or take the file from its author"

_START = 32
"""Bytes that tell files of other kinds."""


def read_shard(file: Path) -> Shard:
    """Tensors and metadata of a safetensors file, from its header alone.

    Raises CheckpointError, with the file and the tensor, if the file breaks a rule of the format: every byte after
    the header belongs to exactly one tensor, and each tensor has as many bytes as its dtype and shape need.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(_START)
            length = header_length(file, start, size)
            stream.seek(PREFIX)
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}.") from error
    return parse_shard(file, text, size)


def header_length(file: Path, prefix: bytes, size: int) -> int:
    """Bytes of the header of a file that is `size` bytes long. prefix: its first bytes, PREFIX at least, or all.

    Raises CheckpointError if there cannot be such a header.
    """
    if len(prefix) < PREFIX:
        raise CheckpointError(f"{file}: is {size} bytes long, too short for safetensors; {_AGAIN}.")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > LONGEST_HEADER:
        if (kind := other_kind(prefix)) is not None:
            raise CheckpointError(f"{file}: {kind}.")
        raise CheckpointError(f"{file}: says its header has {length} bytes, more than any; {_NOT_VALID}.")
    if PREFIX + length > size:
        raise CheckpointError(f"{file}: says its header has {length} bytes, but is {size} bytes long; {_AGAIN}.")
    return length


def parse_shard(file: Path, text: bytes, size: int) -> Shard:
    """As `read_shard`, from the header's bytes and the length of the file, which need not be here."""
    header = _parse(file, text)
    metadata = _metadata(file, header.pop("__metadata__", None))
    start = PREFIX + len(text)
    tensors = sorted(
        (_entry(file, name, value, start, size) for name, value in header.items()),
        key=lambda tensor: (tensor.start, tensor.stop),
    )
    _check_layout(file, tensors, start, size)
    return Shard(file, tuple(tensors), metadata)


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in keys if names.count(name) > 1)
            raise CheckpointError(f"{file}: the header names '{twice}' twice; {_NOT_VALID}.")
        return keys

    try:
        if not text.startswith(b"{"):
            raise ValueError
        decoded = text.decode("utf-8")
        header = json.loads(decoded, object_pairs_hook=unique)
        check_characters(decoded, header)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: the header is not a JSON object; {_NOT_VALID}.") from None
    assert isinstance(header, dict)  # it starts with a brace
    return header


def _metadata(file: Path, value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: '__metadata__' in the header is not an object; {_NOT_VALID}.")
    for key, entry in value.items():
        if not isinstance(entry, str):
            raise CheckpointError(f"{file}: '{key}' in '__metadata__' is not a string; {_NOT_VALID}.")
    return value


def _entry(file: Path, name: str, value: Any, start: int, size: int) -> TensorEntry:
    """One tensor; `start` is where the header ends and `size` the length of the file."""
    where = f"{file}: tensor '{name}'"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is described by no object; {_NOT_VALID}.")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = ", ".join(DTYPE_BITS)
        raise CheckpointError(
            f"{where} has the unknown dtype {json.dumps(dtype)}: save the model in one of these: {known}."
        )
    if not _counts(shape):
        raise CheckpointError(f"{where} has the shape {json.dumps(shape)}, which is none; {_NOT_VALID}.")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the data_offsets {json.dumps(offsets)}, no range; {_NOT_VALID}.")
    first, last = offsets
    if start + last > size:
        raise CheckpointError(f"{where} ends at byte {start + last}, but the file is {size} bytes long; {_AGAIN}.")
    if (last - first) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise CheckpointError(
            f"{where} has {last - first} bytes, which do not fit {dtype} of shape {list(shape)}; {_NOT_VALID}."
        )
    return TensorEntry(name, dtype, tuple(shape), file, start + first, start + last)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers from 0."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_layout(file: Path, tensors: list[TensorEntry], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end, before = start, "the header"
    for tensor in tensors:
        if tensor.start < end:
            raise CheckpointError(f"{file}: the bytes of {before} and of tensor '{tensor.name}' overlap; {_NOT_VALID}.")
        if tensor.start > end:
            raise CheckpointError(
                f"{file}: {tensor.start - end} bytes between {before} and tensor '{tensor.name}' belong to no tensor; "
                f"{_NOT_VALID}."
            )
        end, before = tensor.stop, f"tensor '{tensor.name}'"
    if end < size:
        raise CheckpointError(f"{file}: {size - end} bytes after {before} belong to no tensor; {_NOT_VALID}.")
