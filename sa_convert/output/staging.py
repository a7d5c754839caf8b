"""Builds an output folder beside its destination, so that it appears there complete or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sa_convert.errors import OutputError
from sa_convert.output.disk_space import check_space
from sa_convert.output.leftovers import PUT_ASIDE, hold, release, remove_leftovers, stage_name, turn
from sa_convert.output.replaceable import check_destination, check_source
from sa_convert.output.signals import termination_as_exit, undisturbed

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than this system allows",
}


class Stage:
    """folder: where to write; it has no other content, and a name that no other folder has."""

    def __init__(self, destination: Path, overwrite: bool) -> None:
        self.destination = destination
        self.overwrite = overwrite
        self.root = destination.parent / stage_name(destination)
        # Transformers keeps the code of local models by the name of their folder, so the name must be unique.
        self.folder = self.root / f"staged_{secrets.token_hex(4)}"

    @property
    def workspace(self) -> Path:
        """A folder for files that are needed on the way; made when first asked for, and removed with the rest."""
        path = self.root / "workspace"
        path.mkdir(exist_ok=True)
        return path

    def publish(self) -> None:
        """Rename the folder to the destination; what was there before stays until then, and comes back on failure.

        Raises OutputError if something else has appeared at the destination.
        """
        aside = self.root / PUT_ASIDE
        with undisturbed(), turn(self.destination.parent):
            check_destination(self.destination, self.overwrite)
            try:
                if self.destination.exists():
                    self.destination.rename(aside)
                try:
                    self.folder.rename(self.destination)
                except BaseException:
                    if aside.exists():
                        aside.rename(self.destination)
                    raise
            except OSError as error:
                raise OutputError(
                    f"{self.destination}: the finished folder cannot be moved there: {error.strerror}; use another -o."
                ) from error


@contextmanager
def staging(destination: Path, overwrite: bool, needed_bytes: int, source: Path | None = None) -> Iterator[Stage]:
    """Checks that `destination` can be written, and yields a stage beside it; see `Stage`.

    overwrite: an empty folder or an earlier output at the destination may be replaced. needed_bytes: free disk space
    that the result takes. source: folder or file of the base model, which must survive. Whatever ends the block, Ctrl-C
    and SIGTERM included, nothing stays but what `publish` has put at the destination. What killed runs have left behind
    is removed first. Raises OutputError before the first byte is written, and if the disk is full later.
    """
    destination = Path(os.path.abspath(destination))
    check_source(destination, source)
    remove_leftovers(destination)
    check_destination(destination, overwrite)
    check_space(destination, needed_bytes)
    stage = Stage(destination, overwrite)
    lock: int | None = None
    with termination_as_exit():
        try:
            try:
                lock = hold(stage.root)
                stage.folder.mkdir()
            except OSError as error:
                raise OutputError(
                    f"{destination.parent}: cannot be written to: {error.strerror}; use another -o."
                ) from error
            yield stage
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OutputError(
                f"{destination}: cannot be written: {_FULL[error.errno]}; nothing was left there. "
                "Make room or use another -o."
            ) from error
        finally:
            with undisturbed():
                shutil.rmtree(stage.root, ignore_errors=True)
                if lock is not None:
                    release(lock)
