"""Brings a file into memory ahead of those who read it through a mapping."""

import os
import threading
from contextlib import suppress
from pathlib import Path

_PIECE = 4 << 20
"""Bytes that are read at once."""


def read_ahead(file: Path) -> threading.Thread:
    """Read the file from its beginning to its end, which is the order of the layers, in a thread. What it reads stays
    in the system's memory for files, where the mapping finds it. Nothing depends on it: errors end it silently."""
    thread = threading.Thread(target=_read, args=(file,), name="session ahead", daemon=True)
    thread.start()
    return thread


def _read(file: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            piece = bytearray(_PIECE)
            place = 0
            while count := os.preadv(descriptor, [piece], place):
                place += count
        finally:
            os.close(descriptor)
