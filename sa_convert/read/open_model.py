"""Opens whatever the user calls MODEL."""

import os
from dataclasses import replace
from pathlib import Path

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError
from sa_convert.read.folder import INDEX, SINGLE, open_folder
from sa_convert.read.hub_names import HubName, hub_name
from sa_convert.read.pickled import has_pickled, open_pickled


def open_model(reference: str, workspace: Path | None = None, dtype: str = "float32") -> Checkpoint:
    """The checkpoint that `reference` names: a folder, a .gguf file, or, if neither exists, a model on the Hub.

    workspace: an empty folder, or one to be made, for a model that must be written as safetensors first (.bin, .gguf).
    Without it such a model is only described: enough to inspect it, not to convert it; and of a model on the Hub no
    weights are downloaded. dtype: of the weights that a .gguf file is dequantised to. Raises CheckpointError,
    UnsupportedModelError.
    """
    path = Path(reference)
    name = None if os.path.exists(path) else hub_name(reference)
    if name is not None and path.suffix.lower() != ".gguf":
        return _open_hub(name, workspace)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from sa_convert.read.gguf import open_gguf

        return open_gguf(path, workspace, reference, dtype)
    if not os.path.exists(path):  # which says no of a name too long for any file
        raise CheckpointError(
            f"{reference}: there is no such folder or file; models on the Hub are called org/name or org/name@revision."
        )
    return _open_folder(path, workspace, reference)


def complete(described: Checkpoint, reference: str, workspace: Path, dtype: str = "float32") -> Checkpoint:
    """What `open_model(reference)` has described, with all of its weights at hand, as safetensors.

    workspace, dtype: as in `open_model`; nothing is made there for a model that has safetensors. Raises the same.
    """
    if described.is_safetensors and not described.absent:
        return described
    local = os.path.exists(reference)
    found = open_model(reference, workspace, dtype) if local else _downloaded(described, workspace)
    return replace(found, trusted=described.trusted)


def _open_hub(name: HubName, workspace: Path | None) -> Checkpoint:
    from sa_convert.read.hub import open_hub, snapshot

    described = open_hub(name)
    if described is None:  # all of it is in the cache
        folder = snapshot(name)
        return replace(_open_folder(folder, workspace, name.repo), revision=folder.name)
    return described if workspace is None else _downloaded(described, workspace)


def _downloaded(described: Checkpoint, workspace: Path | None) -> Checkpoint:
    from sa_convert.read.hub_download import download

    download(described, described.trusted)
    found = _open_folder(described.folder, workspace, described.identity)
    return replace(found, revision=described.revision)


def _open_folder(folder: Path, workspace: Path | None, identity: str) -> Checkpoint:
    if folder.is_dir() and not _has_safetensors(folder):
        if has_pickled(folder):
            return open_pickled(folder, workspace, identity)
        if not (folder / "config.json").exists():
            gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
            if gguf is not None:
                raise CheckpointError(
                    f"{folder}: has no config.json but .gguf files; give the file itself, such as {gguf}."
                )
    return open_folder(folder, identity)


def _has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()
