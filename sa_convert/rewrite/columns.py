"""Copies some columns of a tensor from file to file: small runs of bytes of every row, gathered block by block."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sa_convert.rewrite.ranges import SourceTooShortError, write_at

BLOCK = 2 * 1024 * 1024
"""Bytes of the source that are in memory at a time, or one row if that is more."""

_VIEWS = 16 * 1024
"""Runs gathered at a time. Each is an object of some 200 bytes, which for narrow runs is more than their data."""


@dataclass(frozen=True)
class Columns:
    """Parts of each row of a matrix. start: byte of `file` where its first row begins; row_bytes: length of a row.

    runs: byte ranges within a row, in the order in which the new row has them.
    """

    file: Path
    start: int
    rows: int
    row_bytes: int
    runs: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return self.rows * sum(stop - start for start, stop in self.runs)


def copy_columns(columns: Columns, source: int, target: int, position: int, advance: Callable[[int], None]) -> None:
    """Write the columns, row by row, from file descriptor `source` to byte `position` of `target`.

    advance: called with the number of bytes after each block; may raise to stop the copy.
    Raises SourceTooShortError, and OSError if bytes cannot be read or written.
    """
    width = columns.row_bytes
    height = max(1, min(BLOCK // width, _VIEWS // len(columns.runs), columns.rows))
    buffer = memoryview(bytearray(height * width))
    with io.FileIO(source, closefd=False) as stream:
        stream.seek(columns.start)
        for first in range(0, columns.rows, height):
            block = buffer[: min(height, columns.rows - first) * width]
            _fill(stream, block)
            data = b"".join(
                [block[row + start : row + stop] for row in range(0, len(block), width) for start, stop in columns.runs]
            )
            write_at(target, position, data)
            position += len(data)
            advance(len(data))


def _fill(stream: io.FileIO, block: memoryview) -> None:
    """Read as many bytes as the block has; a single call may give fewer."""
    filled = 0
    while filled < len(block):
        count = stream.readinto(block[filled:])
        if not count:
            raise SourceTooShortError
        filled += count
