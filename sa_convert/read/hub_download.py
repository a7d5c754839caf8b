"""Files of a model on the Hub, downloaded into the ordinary cache; nothing there is ever changed or removed."""

import os
from glob import escape
from pathlib import Path
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint
from sa_convert.errors import CheckpointError
from sa_convert.read.folder import read_json
from sa_convert.read.hub_errors import hub_errors
from sa_convert.read.hub_names import HubName
from sa_convert.read.inside import check_inside
from sa_convert.read.side_files import is_code


def download(checkpoint: Checkpoint, code: bool) -> None:
    """Fetch what `checkpoint.folder` lacks; Python files only with `code`. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    files = [path for path in checkpoint.absent if code or not is_code(path)]
    if not files:
        return
    name = HubName(checkpoint.identity, checkpoint.revision)
    with hub_errors(name):
        snapshot_download(name.repo, revision=name.revision, allow_patterns=[escape(path.as_posix()) for path in files])
    missing = next((path for path in files if not os.path.exists(checkpoint.folder / path)), None)
    if missing is not None:
        raise CheckpointError(f"{name}: {missing} could not be downloaded: check the network, and run again.")


def download_file(name: HubName, file: str) -> Path:
    """One file, from the cache if it is there. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download

    with hub_errors(name):
        return Path(hf_hub_download(name.repo, file, revision=name.revision))


def side_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The content of a JSON file beside config.json, or an empty object if the model has none.

    Raises CheckpointError.
    """
    path = Path(name)
    if path not in checkpoint.side_files:
        return {}
    if path in checkpoint.absent:
        download_file(HubName(checkpoint.identity, checkpoint.revision), name)
    check_inside(checkpoint.folder / path, checkpoint.folder.resolve(), "this part of the model")
    return read_json(checkpoint.folder / path)
