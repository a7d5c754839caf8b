"""What the Hub says about repositories: info, tree, paths, refs, commits, access."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, quote

from .access import commit_of, opened, readable, writable
from .card import front_matter
from .http import HubError, Request, Response, answer, route
from .store import Commit, File, Repository, git_hash

REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"


def describe(repository: Repository, commit: Commit, blobs: bool) -> dict[str, Any]:
    """The JSON of model info (dataset info is near enough), for one commit."""
    siblings: list[dict[str, Any]] = []
    for path, file in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"blobId": file.oid, "size": file.content.size}
            if file.lfs:
                pointer = {"sha256": file.content.sha256, "size": file.content.size, "pointerSize": len(file.pointer)}
                sibling["lfs"] = pointer
        siblings.append(sibling)
    readme = commit.files.get("README.md")
    card = front_matter(readme.content.read(0, readme.content.size).decode()) if readme else None
    data = card if isinstance(card, dict) else {}
    described = {
        "_id": git_hash("repo", repository.name.encode())[:24],
        "id": repository.name,
        "modelId": repository.name,
        "author": repository.name.split("/")[0],
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": next(iter(repository.commits.values())).date,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [str(tag) for tag in data.get("tags") or ()],
        "usedStorage": sum(content.size for content in repository.objects.values()),
        "spaces": [],
        "siblings": siblings,
    }
    described |= {key: data[key] for key in ("pipeline_tag", "library_name", "model-index") if data.get(key)}
    if data:
        described["cardData"] = data
    config = commit.files.get("config.json")
    if config:
        try:
            loaded = json.loads(config.content.read(0, config.content.size))
        except ValueError:
            loaded = {}
        described["config"] = {key: loaded[key] for key in ("architectures", "model_type", "auto_map") if key in loaded}
    return described


@route("GET", REPO)
@route("GET", REPO + r"/revision/([^/]+)")
def info(request: Request, kinds: str, name: str, revision: str = "main") -> Response:
    repository = readable(request, kinds, name)
    described = describe(repository, commit_of(repository, revision), request.flag("blobs"))
    if wanted := request.query.get("expand"):
        described = {key: value for key, value in described.items() if key in ("_id", "id", *wanted)}
    return answer(described)


def entry(path: str, file: File, commit: Commit, expand: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.content.size, "path": path}
    if file.lfs:
        pointer_size = len(file.pointer)
        described["lfs"] = {"oid": file.content.sha256, "size": file.content.size, "pointerSize": pointer_size}
    if expand:
        described["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
        described["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return described


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": git_hash("tree", path.encode()), "size": 0, "path": path}


@route("GET", REPO + r"/tree/([^/]+)(?:/(.+))?")
def tree(request: Request, kinds: str, name: str, revision: str, folder: str | None) -> Response:
    repository = readable(request, kinds, name)
    commit = commit_of(repository, revision)
    prefix = f"{folder.strip('/')}/" if folder else ""
    below = {path: file for path, file in sorted(commit.files.items()) if path.startswith(prefix)}
    if folder and not below:
        raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound", X_Repo_Commit=commit.sha)
    recursive, expand = request.flag("recursive"), request.flag("expand")
    entries: dict[str, dict[str, Any]] = {}
    for path, file in below.items():
        names = path[len(prefix) :].split("/")
        for depth in range(1, len(names)) if recursive else range(1, min(2, len(names))):
            parent = prefix + "/".join(names[:depth])
            entries.setdefault(parent, folder_entry(parent))
        if recursive or len(names) == 1:
            entries[path] = entry(path, file, commit, expand)
    listed = list(entries.values())
    start = int(request.query.get("cursor", ["0"])[0])
    stop = start + request.hub.page_size
    headers: dict[str, Any] = {}
    if stop < len(listed):
        where = f"/{quote(folder, safe='')}" if folder else ""
        url = f"{request.hub.url}/api/{kinds}/{name}/tree/{quote(revision, safe='')}{where}"
        url += f"?recursive={recursive}&expand={expand}&cursor={stop}"
        headers["Link"] = f'<{url}>; rel="next"'
    return answer(listed[start:stop], **headers)


@route("POST", REPO + r"/paths-info/([^/]+)")
def paths_info(request: Request, kinds: str, name: str, revision: str) -> Response:
    """Files and folders among the paths asked for; paths that do not exist are left out."""
    commit = commit_of(readable(request, kinds, name), revision)
    form = parse_qs(request.body.decode())
    expand = form.get("expand", ["false"])[0].lower() == "true"
    found = []
    for path in form.get("paths", []):
        if path in commit.files:
            found.append(entry(path, commit.files[path], commit, expand))
        elif any(other.startswith(f"{path.strip('/')}/") for other in commit.files):
            found.append(folder_entry(path.strip("/")))
    return answer(found)


@route("GET", REPO + "/refs")
def refs(request: Request, kinds: str, name: str) -> Response:
    repository = readable(request, kinds, name)
    listed = {
        key: [{"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": sha} for ref, sha in held.items()]
        for key, place, held in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
    }
    return answer({**listed, "converts": [], "pullRequests": []})


@route("GET", REPO + r"/commits/([^/]+)")
def commits(request: Request, kinds: str, name: str, revision: str) -> Response:
    repository = readable(request, kinds, name)
    return answer(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in repository.history(commit_of(repository, revision))
        ]
    )


@route("GET", REPO + r"/auth-check(/write)?")
def auth_check(request: Request, kinds: str, name: str, write: str | None) -> Response:
    (writable if write else opened)(request, kinds, name)
    return answer({})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(request: Request) -> Response:
    """Asked once for an empty HF_HOME: which programs are agents. None here."""
    return answer({"standardEnvVars": [], "harnesses": {}})


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Response:
    user = request.user
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return answer(
        {
            "type": "user",
            "id": git_hash("user", user["name"].encode())[:24],
            "name": user["name"],
            "fullname": user["name"],
            "isPro": False,
            "orgs": [{"type": "org", "name": org, "fullname": org} for org in user.get("orgs", ())],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": user["role"]}},
        }
    )
