"""The plan of one rewritten safetensors file: its header, and which bytes of the base (and of refits) follow it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sa_convert.domain.checkpoint import DTYPE_BITS, Shard, TensorEdit, TensorEntry
from sa_convert.errors import CheckpointError
from sa_convert.rewrite.columns import Columns

_PAGE = 4096


@dataclass(frozen=True)
class Range:
    """Bytes start to stop of a file."""

    file: Path
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Piece:
    """One tensor of the new file; parts: where its bytes are, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Range | Columns, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ShardPlan:
    """header: the first bytes of the new file. parts: the bytes that follow it, ranges joined if they touch."""

    header: bytes
    pieces: tuple[Piece, ...]

    @property
    def parts(self) -> tuple[Range | Columns, ...]:
        joined: list[Range | Columns] = []
        for part in (part for piece in self.pieces for part in piece.parts if part.bytes):
            last = joined[-1] if joined else None
            if (
                isinstance(last, Range)
                and isinstance(part, Range)
                and (last.file, last.stop) == (part.file, part.start)
            ):
                joined[-1] = Range(part.file, last.start, part.stop)
            else:
                joined.append(part)
        return tuple(joined)

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(piece.bytes for piece in self.pieces)


def plan_shard(shard: Shard, edits: Mapping[str, TensorEdit]) -> ShardPlan:
    """What the edits make of a shard. Raises CheckpointError for rows or columns that do not end at whole bytes."""
    added = [(name, edit) for name, edit in edits.items() if edit.after is not None]
    found: list[Piece] = []
    for tensor in shard.tensors:
        edit = edits.get(tensor.name, TensorEdit())
        found += [] if edit.drops else [_piece(tensor, edit)]
        found += [_new(name, new.replacement) for name, new in added if new.after == tensor.name]
    pieces = tuple(found)
    if _aligned([(tensor.dtype, tensor.bytes) for tensor in shard.tensors]) and not _aligned(
        [(piece.dtype, piece.bytes) for piece in pieces]
    ):
        # What was dropped had padded what follows. Widest elements first, as safetensors itself writes, mends it.
        pieces = tuple(sorted(pieces, key=lambda piece: -_alignment(piece.dtype)))
    return ShardPlan(_header(pieces, shard.metadata, _data_start(shard)), pieces)


def _piece(tensor: TensorEntry, edit: TensorEdit) -> Piece:
    name = edit.name or tensor.name
    if edit.replacement is not None:
        return _new(name, edit.replacement)
    if edit.rows is None:
        return Piece(name, tensor.dtype, tensor.shape, (Range(tensor.file, tensor.start, tensor.stop),))
    return Piece(name, tensor.dtype, edit.shape(tensor), _kept(tensor, edit.rows, edit.axis))


def _new(name: str, tensor: TensorEntry | None) -> Piece:
    """A tensor that comes from a file of ours."""
    if tensor is None:
        raise ValueError(f"'{name}' is new, but has no data")
    return Piece(name, tensor.dtype, tensor.shape, (Range(tensor.file, tensor.start, tensor.stop),))


def _kept(tensor: TensorEntry, kept: tuple[tuple[int, int], ...], axis: int) -> tuple[Range | Columns, ...]:
    """Where the bytes of these ranges of an axis are."""
    if axis and (axis != 1 or len(tensor.shape) != 2):
        raise ValueError(f"'{tensor.name}' has shape {tensor.shape}; only axis 0, or 1 of two, can be taken apart")
    word, total = ("columns" if axis else "rows"), (tensor.shape[axis] if tensor.shape else 0)
    flat = [0, *(border for borders in sorted(kept) for border in borders), total]
    if flat != sorted(flat):
        raise ValueError(f"{word} {kept} overlap, or are not ranges of the {total} {word} of '{tensor.name}'")
    bits = prod(tensor.shape[axis + 1 :]) * DTYPE_BITS[tensor.dtype]
    for start, stop in kept:
        # Every row of a matrix has to begin at a whole byte for its columns to do so.
        if start * bits % 8 or stop * bits % 8 or axis * total * bits % 8:
            raise CheckpointError(
                f"{tensor.file}: {word} {start} to {stop} of tensor '{tensor.name}' ({tensor.dtype}) do not begin and "
                "end at whole bytes, so they cannot be taken apart; convert the unquantised model."
            )
    runs = tuple((start * bits // 8, stop * bits // 8) for start, stop in kept)
    if axis:
        return (Columns(tensor.file, tensor.start, tensor.shape[0], total * bits // 8, runs),)
    return tuple(Range(tensor.file, tensor.start + start, tensor.start + stop) for start, stop in runs)


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

    Tensors start at a multiple of 8 bytes, and, if the base's do too, at the same byte of a page: pages then move
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
