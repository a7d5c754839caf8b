"""Which files a model folder may refer to: those inside of it, and its own blobs in a Hugging Face cache."""

import os
from pathlib import Path, PurePosixPath

from sa_convert.errors import CheckpointError


def real_folder(folder: Path) -> Path:
    """The folder, links resolved. Raises CheckpointError if there is none."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: there is no such folder.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; give the folder that holds config.json and the weights.")
    return folder.resolve()


def revision_of(folder: Path) -> str | None:
    """The commit, if a (resolved) folder is a snapshot in a Hugging Face cache."""
    return folder.name if _blobs(folder) is not None else None


def check_inside(file: Path, folder: Path, what: str) -> None:
    """Raises CheckpointError unless `file`, links resolved, is a regular file inside of `folder` (resolved).

    A snapshot in a Hugging Face cache (models--org--name/snapshots/COMMIT) may link into models--org--name/blobs, and
    these into the blobs that all models of the cache share.
    what: how the message calls the file.
    """
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        if os.path.islink(file):  # which says no of a name too long for any file
            raise CheckpointError(
                f"{file}: {what} is a link to nothing; put the file there, or download the model whole."
            ) from None
        raise CheckpointError(f"{file}: {what} is missing; put it there, or download the model whole.") from None
    if not real.is_relative_to(folder) and not _is_blob(file, real, folder):
        raise CheckpointError(
            f"{file}: {what} is a link that leads out of the model's folder, to {real}; "
            "put the file itself into the folder."
        )
    if not real.is_file():
        kind = "a link to a folder" if real.is_dir() and file.is_symlink() else "no regular file"
        raise CheckpointError(f"{file}: {what} is {kind}; put the files themselves into the model's folder.")


def leads_out(name: str) -> bool:
    """Whether a file of this name, as an index or the Hub gives it, would lie outside of the model's folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts


def _is_blob(file: Path, real: Path, folder: Path) -> bool:
    """Whether `file`, which resolves to `real`, belongs to a snapshot, and links to a blob of the same model."""
    blobs = _blobs(folder)
    if blobs is None or real.is_relative_to(blobs):
        return blobs is not None
    if not file.is_symlink():
        return False
    first = Path(os.path.normpath(file.parent.resolve() / os.readlink(file)))
    return first.is_relative_to(blobs) and real.is_relative_to(blobs.parent.parent / "blobs")


def _blobs(folder: Path) -> Path | None:
    home = folder.parent.parent
    if folder.parent.name == "snapshots" and home.name.startswith("models--") and (home / "blobs").is_dir():
        return home / "blobs"
    return None
