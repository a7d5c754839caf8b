"""Copies ranges of bytes from file to file in the kernel, if it can."""

import errno
import os
from collections.abc import Callable

CHUNK = 16 * 1024 * 1024
"""Bytes moved between two reports; small enough for a prompt stop, large enough to cost nothing."""

_BUFFER = 1024 * 1024

_NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EPERM, errno.EBADF)
"""What a kernel, a file system or a sandbox answers that cannot move these bytes in this way."""


class SourceTooShortError(Exception):
    """The source file ends within a range."""


def reserve(target: int, size: int) -> None:
    """Have the file system set aside `size` bytes for an empty file, if it can.

    Saves a quarter of the kernel's time for the copy, and tells at once if there is not enough room (OSError).
    `os.posix_fallocate` would write to every block of file systems that cannot.
    """
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None or size <= 0:
        return
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(target, 0, 0, size):
        number = ctypes.get_errno()
        if number not in (*_NOT_HERE, errno.EINTR):
            raise OSError(number, os.strerror(number))


def copy_range(source: int, start: int, stop: int, target: int, position: int, advance: Callable[[int], None]) -> None:
    """Copy the bytes `start:stop` of file descriptor `source` to byte `position` of `target`.

    advance: called with the number of bytes after each chunk; may raise to stop the copy.
    Raises SourceTooShortError, and OSError if bytes cannot be read or written.
    """
    ways = [_copy_file_range, _send_file, _read_and_write]
    while start < stop:
        try:
            moved = ways[0](source, start, min(CHUNK, stop - start), target, position)
        except OSError as error:
            if error.errno not in _NOT_HERE or len(ways) == 1:
                raise
            moved = 0
        if moved:
            start, position = start + moved, position + moved
            advance(moved)
        elif len(ways) > 1:  # some file systems answer 0 to what they cannot do
            del ways[0]
        else:
            raise SourceTooShortError


def _copy_file_range(source: int, start: int, count: int, target: int, position: int) -> int:
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.copy_file_range(source, target, count, start, position)


def _send_file(source: int, start: int, count: int, target: int, position: int) -> int:
    if not hasattr(os, "sendfile"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    os.lseek(target, position, os.SEEK_SET)
    return os.sendfile(target, source, start, count)


def _read_and_write(source: int, start: int, count: int, target: int, position: int) -> int:
    os.lseek(source, start, os.SEEK_SET)
    data = os.read(source, min(count, _BUFFER))
    write_at(target, position, data)
    return len(data)


def write_at(target: int, position: int, data: bytes) -> None:
    """Write all of the data at byte `position` of file descriptor `target`. Raises OSError."""
    os.lseek(target, position, os.SEEK_SET)
    left = memoryview(data)
    while left:
        left = left[os.write(target, left) :]
