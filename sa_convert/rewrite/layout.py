"""The plan of one rewritten safetensors file: its header, and which bytes of the base (and of refits) follow it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sa_convert.data.checkpoint import DTYPE_BITS, Shard, TensorEdit, TensorEntry
from sa_convert.errors import CheckpointError

Range = tuple[Path, int, int]
"""Bytes start to stop of a file."""

_PAGE = 4096


@dataclass(frozen=True)
class Piece:
    """One tensor of the new file; ranges: where its bytes are, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    @property
    def bytes(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ShardPlan:
    """header: the first bytes of the new file. ranges: the bytes that follow it, joined where they touch."""

    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def ranges(self) -> tuple[Range, ...]:
        joined: list[Range] = []
        for file, start, stop in (piece for tensor in self.pieces for piece in tensor.ranges if piece[1] < piece[2]):
            if joined and joined[-1][0] == file and joined[-1][2] == start:
                joined[-1] = (file, joined[-1][1], stop)
            else:
                joined.append((file, start, stop))
        return tuple(joined)

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(piece.bytes for piece in self.pieces)


def plan_shard(shard: Shard, edits: Mapping[str, TensorEdit]) -> ShardPlan:
    """What the edits make of a shard. Raises CheckpointError for rows that do not end at whole bytes."""
    pieces = tuple(
        _piece(tensor, edits.get(tensor.name, TensorEdit()))
        for tensor in shard.tensors
        if tensor.name not in edits or not edits[tensor.name].drops
    )
    if _aligned([(tensor.dtype, tensor.bytes) for tensor in shard.tensors]) and not _aligned(
        [(piece.dtype, piece.bytes) for piece in pieces]
    ):
        # What was dropped had padded what follows. Widest elements first, as safetensors itself writes, mends it.
        pieces = tuple(sorted(pieces, key=lambda piece: -_alignment(piece.dtype)))
    return ShardPlan(_header(pieces, shard.metadata, _data_start(shard)), pieces)


def _piece(tensor: TensorEntry, edit: TensorEdit) -> Piece:
    name = edit.name or tensor.name
    if edit.replacement is not None:
        new = edit.replacement
        if (new.dtype, new.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"'{tensor.name}' is {tensor.dtype} {tensor.shape}, its new data {new.dtype} {new.shape}")
        return Piece(name, new.dtype, new.shape, ((new.file, new.start, new.stop),))
    if edit.rows is None:
        return Piece(name, tensor.dtype, tensor.shape, ((tensor.file, tensor.start, tensor.stop),))
    total = tensor.shape[0] if tensor.shape else 0
    flat = [0, *(border for rows in edit.rows for border in rows), total]
    if flat != sorted(flat):
        raise ValueError(f"rows {edit.rows} are not ascending ranges of the {total} rows of '{tensor.name}'")
    row_bits = prod(tensor.shape[1:]) * DTYPE_BITS[tensor.dtype]
    ranges = []
    for start, stop in edit.rows:
        if start * row_bits % 8 or stop * row_bits % 8:
            raise CheckpointError(
                f"{tensor.file}: rows {start} to {stop} of tensor '{tensor.name}' ({tensor.dtype}) do not begin and "
                "end at whole bytes, so they cannot be taken apart; convert the unquantised model."
            )
        ranges.append((tensor.file, tensor.start + start * row_bits // 8, tensor.start + stop * row_bits // 8))
    return Piece(name, tensor.dtype, edit.shape(tensor), tuple(ranges))


def _alignment(dtype: str) -> int:
    """Bytes that the offset of a tensor should be a multiple of; 1 for elements below a byte."""
    return max(DTYPE_BITS[dtype] // 8, 1)


def _aligned(tensors: list[tuple[str, int]]) -> bool:
    """Whether every tensor of these dtypes and sizes starts at a multiple of its elements' size."""
    position = 0
    for dtype, size in tensors:
        if position % _alignment(dtype):
            return False
        position += size
    return True


def _data_start(shard: Shard) -> int:
    """Where the tensors of the base's file begin, or 0 if there are none."""
    return shard.tensors[0].start if shard.tensors else 0


def _header(pieces: tuple[Piece, ...], metadata: Mapping[str, str], base_start: int) -> bytes:
    """Length and JSON, padded with spaces.

    Tensors start at a multiple of 8 bytes, and, where the base's do too, at the same byte of a page: pages then move
    whole, which takes the kernel a third less time.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [position, position + piece.bytes],
        }
        position += piece.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    multiple, rest = (_PAGE, base_start % _PAGE) if pieces and base_start % 8 == 0 else (8, 0)
    text += b" " * ((rest - 8 - len(text)) % multiple)
    return len(text).to_bytes(8, "little") + text
