"""The repository to push to: whether a push is likely to be allowed there, and what it would replace."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sa_convert.errors import OutputError
from sa_convert.families.family import PREFIX
from sa_convert.present.hub.upload_errors import no_token, offline, push_errors
from sa_convert.read.folder import read_json
from sa_convert.read.stock_folder import REPORT, stock_told

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo


@dataclass(frozen=True)
class Target:
    """repo_id: `org/name`. private: the repository must be, and is made so. revision: the branch, None for main."""

    repo_id: str
    private: bool = False
    revision: str | None = None


def check_target(repo_id: str, private: bool = False, revision: str | None = None) -> Target:
    """The repository to push to, with its full name, once it is found that a push is likely to be allowed.

    Changes nothing on the Hub. Raises OutputError if the name is none, there is no token or it may not write there,
    and if the repository holds another model, or is public though `private`.
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
        check_private(info, target)
        with suppress(RevisionNotFoundError):  # a branch that will be made
            check_content(api, api.model_info(target.repo_id, revision=revision) if revision else info, target)
        return target


def names_in(info: "ModelInfo") -> set[str]:
    return {sibling.rfilename for sibling in info.siblings or ()}


def _allowed_name(api: "HfApi", repo_id: str) -> str:
    """The full name. Raises OutputError if the token's owner or its kind cannot write there."""
    who = api.whoami()
    namespace, _, name = repo_id.rpartition("/")
    namespace = namespace or who["name"]
    organisations = [organisation.get("name") for organisation in who.get("orgs") or ()]
    known = [str(one) for one in (who["name"], *organisations) if one]
    token = (who.get("auth") or {}).get("accessToken") or {}
    scopes = token.get("fineGrained")
    if token.get("role") == "read" or (scopes is not None and "repo.write" not in str(scopes)):
        raise OutputError(
            f"{repo_id}: your token may only read; make one with write access on "
            "https://huggingface.co/settings/tokens and log in with 'hf auth login'."
        )
    if namespace.lower() not in [one.lower() for one in known]:
        raise OutputError(
            f"{repo_id}: '{namespace}' is neither your account nor one of your organisations, as far as your token "
            f"shows ({', '.join(known)}); use another REPO_ID or token."
        )
    return f"{namespace}/{name}"


def check_private(info: "ModelInfo", target: Target) -> None:
    if target.private and not info.private:
        raise OutputError(
            f"{target.repo_id}: exists and is public, so --private cannot hold; make it private in its settings, use "
            "another REPO_ID, or drop --private."
        )


def check_content(api: "HfApi", info: "ModelInfo", target: Target) -> None:
    """Raises OutputError if weights or a configuration are there that no conversion wrote."""
    names = names_in(info)
    if "config.json" in names:
        with TemporaryDirectory(prefix="sa-convert-") as folder:
            for name in {"config.json", REPORT} & names:
                api.hf_hub_download(target.repo_id, name, revision=info.sha, local_dir=folder)
            kind, stock = str(read_json(Path(folder) / "config.json").get("model_type")), stock_told(Path(folder))
        if kind.startswith(PREFIX) or stock is not None:
            return
        held = f"a model of type '{kind}'"
    else:
        held = next((f"'{name}'" for name in sorted(names) if name.endswith((".safetensors", ".bin", ".gguf"))), "")
    if held:
        raise OutputError(
            f"{target.repo_id}: holds {held}, which is no conversion and would be replaced; use another REPO_ID, or a "
            "new branch with --revision."
        )
