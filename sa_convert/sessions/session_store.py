"""Many sessions in one folder of a limited size: the ones that were not used for longest go first.

Several processes may use one folder. Files are whole or not there (`sa_convert.sessions.session_file`); one process at
a time takes stock and removes. A session that is removed while another process reads it stays readable there.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa_convert.errors import OutputError, SessionError
from sa_convert.sessions.loading import StoredSession, load
from sa_convert.sessions.saving import save
from sa_convert.sessions.session_file import metadata_of

_ENDING = ".session"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class SessionEntry:
    """A session in a store. used: when it was written or loaded last, seconds since 1970. model: SHA-256, see
    `sa_convert.sessions.identity`."""

    name: str
    bytes: int
    used: float
    tokens: int
    model: str


class SessionStore:
    """folder: made if it is not there; it should hold nothing else. limit: bytes of all sessions together."""

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made a folder for sessions: {error.strerror}.") from error

    def put(self, name: str, cache: Any, tokens: torch.Tensor, model: Any, **more: Any) -> int:
        """Keep a session under a name, in place of an earlier one, and let others go until all fit. Returns its bytes;
        the rest as for `sa_convert.sessions.saving.save`.

        Raises SessionError for a session that is larger than the whole store may be; an earlier one of the name is gone
        then.
        """
        size = save(cache, tokens, self._file(name), model, **more)
        with self._alone():
            if size > self.limit:
                self._file(name).unlink(missing_ok=True)
                raise SessionError(f"{name}: takes {size} bytes, and all sessions together may take {self.limit}.")
            self._evict(name)
        return size

    def get(self, name: str, model: Any, **more: Any) -> StoredSession | None:
        """A session, or None if there is none of that name (any more). Raises SessionError if it is another model's."""
        file = self._file(name)
        if not file.exists():
            return None
        try:
            session = load(file, model, **more)
            os.utime(file)
            return session
        except FileNotFoundError:
            return None
        except SessionError:
            if not file.exists():  # it went while it was opened
                return None
            raise

    def remove(self, name: str) -> bool:
        """Whether there was a session of that name."""
        with self._alone():
            try:
                self._file(name).unlink()
                return True
            except FileNotFoundError:
                return False

    def sessions(self) -> list[SessionEntry]:
        """All, the one first that was used last. Files that are no whole sessions are left out."""
        found = []
        for file, size, used in self._files():
            with suppress(SessionError, KeyError, ValueError):
                told = metadata_of(file)
                name = file.name.removesuffix(_ENDING)
                found.append(SessionEntry(name, size, used, int(told["length"]), told["model"]))
        return sorted(found, key=lambda entry: -entry.used)

    def _file(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise SessionError(f"{name!r} is no name of a session: use letters, digits, '.', '_' and '-'.")
        return self.folder / f"{name}{_ENDING}"

    def _files(self) -> list[tuple[Path, int, float]]:
        found = []
        for file in self.folder.glob(f"*{_ENDING}"):
            with suppress(FileNotFoundError):
                told = file.stat()
                found.append((file, told.st_size, told.st_mtime))
        return found

    def _evict(self, name: str) -> None:
        """Remove the sessions that were not used for longest, but for this one, until the others fit beside it."""
        files = sorted(self._files(), key=lambda one: one[2])
        total = sum(size for _, size, _ in files)
        for file, size, _ in files:
            if total <= self.limit:
                return
            if file != self._file(name):
                file.unlink(missing_ok=True)
                total -= size

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, and one thread. The system lets go of the lock if the process dies."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
