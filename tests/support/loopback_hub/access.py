"""Who may read or write what, with the refusals of the Hub (status, X-Error-Code, message)."""

from __future__ import annotations

from .http import HubError, Request
from .store import Commit, Repository


def belongs(request: Request, namespace: str) -> bool:
    user = request.user
    return user is not None and namespace in (user["name"], *user.get("orgs", ()))


def readable(request: Request, kinds: str | None, name: str) -> Repository:
    """The repository; a private one does not exist for others. `kinds` is the plural in URLs, None for models."""
    repository = request.hub.repositories.get(((kinds or "models").rstrip("/")[:-1], name))
    if repository is None or (repository.private and not belongs(request, name.split("/")[0])):
        if request.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repository


def opened(request: Request, kinds: str | None, name: str) -> Repository:
    """The repository, if the contents of its files may be read: gated ones show only their listing to all."""
    repository = readable(request, kinds, name)
    user = request.user
    if repository.gated and not belongs(request, name.split("/")[0]):
        restricted = f"Access to {repository.kind} {name} is restricted"
        if user is None:
            raise HubError(
                401, f"{restricted}. You must have access to it and be authenticated to access it.", "GatedRepo"
            )
        if name not in user.get("gated", ()):
            raise HubError(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")
    return repository


def allow_writing(request: Request, namespace: str) -> None:
    user = request.user
    if user is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    if user["role"] != "write":
        raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
    if not belongs(request, namespace):
        raise HubError(403, f'Forbidden: you don\'t have the rights to write under the namespace "{namespace}"')


def writable(request: Request, kinds: str | None, name: str) -> Repository:
    repository = readable(request, kinds, name)
    allow_writing(request, name.split("/")[0])
    return repository


def commit_of(repository: Repository, revision: str) -> Commit:
    commit = repository.find(revision)
    if commit is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit
