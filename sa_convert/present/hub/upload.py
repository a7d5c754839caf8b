"""Uploads a complete conversion to the Hub, in one commit."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sa_convert.console.amounts import human_bytes
from sa_convert.errors import OutputError, SaConvertError
from sa_convert.families.family import PREFIX
from sa_convert.present.files import card
from sa_convert.present.hub.complete import Conversion, complete_conversion
from sa_convert.present.hub.upload_errors import is_passing, no_token, offline, push_errors
from sa_convert.read.folder import read_json
from sa_convert.read.hub_errors import endpoint

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.hf_api import CommitOperation, ModelInfo

ATTEMPTS = 3
"""Of the upload, where the connection is lost; huggingface_hub repeats the transfer of single files itself."""

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """repo_id: `org/name`. private: the repository must be, and is made so. revision: the branch, None for main."""

    repo_id: str
    private: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Pushed:
    """url: of the model's page. commit: that holds it."""

    url: str
    commit: str


def check_target(repo_id: str, private: bool = False, revision: str | None = None) -> Target:
    """The repository to push to, with its full name, once it is found that a push is likely to be allowed.

    Changes nothing on the Hub. Raises OutputError where the name is none, there is no token or it may not write there,
    and where the repository holds another model, or is public though `private`.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    api = HfApi()
    with push_errors(repo_id):
        validate_repo_id(repo_id)
        if constants.is_offline_mode():
            raise OutputError(offline(repo_id))
        if get_token() is None:
            raise OutputError(no_token(repo_id))
        target = Target(_allowed_name(api, repo_id), private, revision)
        try:
            info = api.model_info(target.repo_id)
        except RepositoryNotFoundError:
            return target
        _check_private(info, target)
        with suppress(RevisionNotFoundError):  # a branch that will be made
            _check_content(api, api.model_info(target.repo_id, revision=revision) if revision else info, target)
        return target


def push(conversion: Conversion, target: Target, announce: Announce = lambda step: None) -> Pushed:
    """Upload all files of a conversion in one commit; the repository and the branch are made where they are missing.

    The uploaded model card names the repository; the folder is not changed. Files that the repository has already are
    not sent again, so a second run goes on where a first was stopped. Weights of an earlier conversion that have no
    place in this one are deleted by the same commit. Raises OutputError.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with push_errors(target.repo_id):
        api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
        _check_private(api.model_info(target.repo_id), target)
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


def push_converted(folder: Path, target: Target, announce: Announce = lambda step: None) -> Pushed:
    """Upload what was just converted. Raises OutputError, which says that the folder stays and how to push it later."""
    try:
        return push(complete_conversion(folder), target, announce)
    except SaConvertError as error:
        private = " --private" if target.private else ""
        raise OutputError(
            f"{error} The conversion itself is complete: sa-convert push {quote(str(folder))} {target.repo_id}{private}"
        ) from error


def _allowed_name(api: "HfApi", repo_id: str) -> str:
    """The full name. Raises OutputError where the token's owner or its kind cannot write there."""
    who = api.whoami()
    namespace, _, name = repo_id.rpartition("/")
    namespace = namespace or who["name"]
    organisations = [organisation.get("name") for organisation in who.get("orgs") or ()]
    known = [str(found) for found in (who["name"], *organisations) if found]
    token = (who.get("auth") or {}).get("accessToken") or {}
    scopes = token.get("fineGrained")
    if token.get("role") == "read" or (scopes is not None and "repo.write" not in str(scopes)):
        raise OutputError(
            f"{repo_id}: your token may only read; make one with write access on "
            "https://huggingface.co/settings/tokens and log in with 'hf auth login'."
        )
    if namespace.lower() not in [found.lower() for found in known]:
        raise OutputError(
            f"{repo_id}: '{namespace}' is neither your account nor one of your organisations, as far as your token "
            f"shows ({', '.join(known)}); use another REPO_ID or token."
        )
    return f"{namespace}/{name}"


def _check_private(info: "ModelInfo", target: Target) -> None:
    if target.private and not info.private:
        raise OutputError(
            f"{target.repo_id}: exists and is public, so --private cannot hold; make it private in its settings, use "
            "another REPO_ID, or drop --private."
        )


def _check_content(api: "HfApi", info: "ModelInfo", target: Target) -> None:
    """Raises OutputError where weights or a configuration are there that no conversion wrote."""
    names = _names(info)
    if "config.json" in names:
        with TemporaryDirectory(prefix="sa-convert-") as folder:
            file = api.hf_hub_download(target.repo_id, "config.json", revision=info.sha, local_dir=folder)
            kind = str(read_json(Path(file)).get("model_type"))
        if kind.startswith(PREFIX):
            return
        held = f"a model of type '{kind}'"
    else:
        held = next((f"'{name}'" for name in sorted(names) if name.endswith((".safetensors", ".bin", ".gguf"))), "")
    if held:
        raise OutputError(
            f"{target.repo_id}: holds {held}, which is no conversion and would be replaced; use another REPO_ID, or a "
            "new branch with --revision."
        )


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
        _check_content(api, info, target)
    operations: list[CommitOperation] = []
    for path in conversion.files:
        file = conversion.folder / path
        content: bytes | Path = file
        if path.as_posix() == card.FILE:
            text = file.read_text(encoding="utf-8")
            content = card.for_repository(text, target.repo_id, target.revision).encode()
        operations.append(CommitOperationAdd(path.as_posix(), content))
    mine = {path.as_posix() for path in conversion.files}
    stale = [name for name in sorted(_names(info) - mine) if _is_weights(name)]
    operations += [CommitOperationDelete(name) for name in stale]
    # Not upload_folder, which makes several commits of large folders.
    return api.create_commit(
        target.repo_id, operations, commit_message="Upload model with shared attention", revision=target.revision
    )


def _is_weights(name: str) -> bool:
    """Whether transformers might load it, in the layout of another conversion: `model.safetensors` wins over shards."""
    return "/" not in name and name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def _names(info: "ModelInfo") -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}
