"""Opens whatever the user calls MODEL."""

import re
from pathlib import Path

from sa_convert.data.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError, UnsupportedModelError
from sa_convert.read.folder import INDEX, SINGLE, open_folder
from sa_convert.read.pickled import has_pickled, open_pickled

_HUB = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?")


def open_model(reference: str, workspace: Path | None = None, dtype: str = "float32") -> Checkpoint:
    """The checkpoint that `reference` names: a folder, or a .gguf file.

    workspace: an empty folder, or one to be made, for a model that must be written as safetensors first (.bin, .gguf).
    Without it such a model is only described: enough to inspect it, not to convert it. dtype: of the weights that a
    .gguf file is dequantised to. Raises CheckpointError, UnsupportedModelError.
    """
    path = Path(reference)
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from sa_convert.read.gguf import open_gguf

        return open_gguf(path, workspace, reference, dtype)
    if not path.exists():
        if _HUB.fullmatch(reference):
            name = reference.partition("@")[0]
            raise UnsupportedModelError(
                f"{reference}: there is no such folder, and models on the Hub come with a later version; "
                f"run 'hf download {name} --local-dir {name.partition('/')[2]}' and give that folder."
            )
        raise CheckpointError(f"{reference}: there is no such folder or file.")
    if path.is_dir() and not _has_safetensors(path):
        if has_pickled(path):
            return open_pickled(path, workspace, reference)
        if not (path / "config.json").exists():
            gguf = next(iter(sorted(path.glob("*.gguf"))), None)
            if gguf is not None:
                raise CheckpointError(
                    f"{path}: has no config.json but .gguf files; give the file itself, such as {gguf}."
                )
    return open_folder(path, reference)


def _has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()
