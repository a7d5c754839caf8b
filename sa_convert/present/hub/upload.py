"""Uploads a complete conversion to the Hub, in one commit."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa_convert.console.amounts import human_bytes
from sa_convert.console.progress import announce
from sa_convert.present.files import card
from sa_convert.present.hub.complete import Conversion
from sa_convert.present.hub.target import Target, check_content, check_private, names_in
from sa_convert.present.hub.upload_errors import is_passing, push_errors
from sa_convert.read.hub_errors import endpoint

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.hf_api import CommitOperation

ATTEMPTS = 3
"""Of the upload, if the connection is lost; huggingface_hub repeats the transfer of single files itself."""


@dataclass(frozen=True)
class Pushed:
    """url: of the model's page. commit: that holds it."""

    url: str
    commit: str


def upload(conversion: Conversion, target: Target) -> Pushed:
    """Upload all files of a conversion in one commit; the repository and the branch are made if they are missing.

    The uploaded model card names the repository; the folder is not changed. Files that the repository has already are
    not sent again, so a second run goes on where a first was stopped. Weights of an earlier conversion that have no
    place in this one are deleted by the same commit. Raises OutputError.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with push_errors(target.repo_id):
        api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
        check_private(api.model_info(target.repo_id), target)
        made = target.revision is not None and _make_branch(api, target)
        announce(f"uploading {len(conversion.files)} files, {human_bytes(conversion.size)}, to {target.repo_id}")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                commit = _commit(api, conversion, target, made)
                break
            except Exception as error:
                if attempt == ATTEMPTS or not is_passing(error):
                    raise
                announce("the connection was lost; uploading what is missing")
                time.sleep(attempt)
        url = f"{endpoint()}/{target.repo_id}"
        return Pushed(f"{url}/tree/{target.revision}" if target.revision else url, commit.oid)


def _make_branch(api: "HfApi", target: Target) -> bool:
    """Whether the branch was made now, and so holds what main holds."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_branch(target.repo_id, branch=target.revision or "main")
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        return False
    return True


def _commit(api: "HfApi", conversion: Conversion, target: Target, fresh: bool) -> "CommitInfo":
    """fresh: what the branch holds is a copy of main's, and may be replaced whatever it is.

    What the repository holds is looked up anew each time: a commit may have arrived though its answer did not.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    info = api.model_info(target.repo_id, revision=target.revision)
    if not fresh:
        check_content(api, info, target)
    operations: list[CommitOperation] = []
    for path in conversion.files:
        file = conversion.folder / path
        content: bytes | Path = file
        if path.as_posix() == card.FILE:
            text = file.read_text(encoding="utf-8")
            content = card.for_repository(text, target.repo_id, target.revision).encode()
        operations.append(CommitOperationAdd(path.as_posix(), content))
    mine = {path.as_posix() for path in conversion.files}
    stale = [name for name in sorted(names_in(info) - mine) if _is_weights(name)]
    operations += [CommitOperationDelete(name) for name in stale]
    # Not upload_folder, which makes several commits of large folders.
    return api.create_commit(
        target.repo_id, operations, commit_message="Upload model with shared attention", revision=target.revision
    )


def _is_weights(name: str) -> bool:
    """Whether transformers might load it, in the layout of another conversion: `model.safetensors` wins over shards."""
    return "/" not in name and name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
