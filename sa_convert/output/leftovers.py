"""Folders that runs build their output in: their names, who holds them, and what to do with those of killed runs."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"
"""A file in every stage, locked by the process that builds it. The system drops the lock when the process dies."""

PUT_ASIDE = "put_aside"
"""In a stage, the earlier output while the new one takes its place."""


def stage_name(destination: Path) -> str:
    """A new hidden name beside the destination."""
    return f".{destination.name}.sa-convert-{secrets.token_hex(4)}"


def hold(root: Path) -> int:
    """Make the stage and lock it. Returns the lock's file descriptor, for `release`. Raises OSError."""
    while True:
        root.mkdir(exist_ok=True)
        descriptor = _lock(root)
        if descriptor is not None:
            return descriptor
        # Another run took the new stage for a leftover, before it was locked. It is gone in a moment.


def release(descriptor: int) -> None:
    os.close(descriptor)


def remove_leftovers(destination: Path) -> None:
    """Remove the stages of earlier runs for this destination that no living process holds.

    A run that was killed between putting the earlier output aside and putting the new one in place lost neither: the
    earlier one is put back.
    """
    pattern = re.compile(re.escape(f".{destination.name}.sa-convert-") + "[0-9a-f]{8}")
    try:
        names = [name for name in os.listdir(destination.parent) if pattern.fullmatch(name)]
    except OSError:  # no such folder, or not ours to read: the checks that follow say so
        return
    for name in names:
        root = destination.parent / name
        try:
            descriptor = _lock(root)
        except OSError:  # another user's
            continue
        if descriptor is None:
            continue
        aside = root / PUT_ASIDE
        with turn(destination.parent):
            if aside.exists() and not os.path.lexists(destination):
                aside.rename(destination)
        shutil.rmtree(root, ignore_errors=True)
        release(descriptor)


@contextmanager
def turn(parent: Path) -> Iterator[None]:
    """One process at a time moves folders to and from destinations in `parent`; it takes no time worth telling.

    Without it, two runs could both see that nothing is at their destination, and the later one would replace what the
    earlier one has just put there. If a folder cannot be locked (no right to read it, some network file systems),
    the renames themselves keep every folder whole.
    """
    try:
        descriptor = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(root: Path) -> int | None:
    """The lock of a stage, or None if a living process has it or the stage has vanished. Raises OSError."""
    try:
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(root / LOCK)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
