"""The folders whose code the user lets run, while a command is at work."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_TRUSTED: ContextVar[frozenset[Path]] = ContextVar("trusted", default=frozenset())


@contextmanager
def trusting(folder: Path, trusted: bool = True) -> Iterator[None]:
    """Inside of the block, tokenizers in `folder` run by code of their own, if `trusted`."""
    token = _TRUSTED.set(_TRUSTED.get() | {folder.resolve()} if trusted else _TRUSTED.get())
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted(folder: Path) -> bool:
    """Whether the code in this folder may run."""
    return folder.resolve() in _TRUSTED.get()
