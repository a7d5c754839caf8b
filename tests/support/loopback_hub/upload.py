"""Writing: repositories, branches and tags, preupload, LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from .access import allow_writing, commit_of, readable, writable
from .download import check_signature, signature
from .http import HubError, Request, Response, answer, route
from .metadata import REPO
from .store import GITATTRIBUTES, Content, File, Repository, is_lfs, repository_name_is_valid

LFS = r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects"


def named_in(request: Request) -> tuple[str, str]:
    """Kind and full name of the repository that a body names."""
    body = request.json()
    owner = body.get("organization") or (request.user or {}).get("name", "")
    return body.get("type") or "model", f"{owner}/{body['name']}"


@route("POST", "/api/repos/create")
def create_repository(request: Request) -> Response:
    kind, name = named_in(request)
    if not repository_name_is_valid(name):
        raise HubError(400, f"Invalid repo name: {name}")
    allow_writing(request, name.split("/")[0])
    described = {"url": f"{request.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
    if (kind, name) in request.hub.repositories:
        return answer({**described, "error": f"You already created this {kind} repo"}, 409)
    body = request.json()  # huggingface_hub 2 says visibility, 0.36 private
    repository = Repository(kind, name, private=body.get("visibility") == "private" or bool(body.get("private")))
    attributes = {".gitattributes": File(Content(GITATTRIBUTES), False)}
    repository.commit(attributes, "main", "initial commit", author=(request.user or {})["name"])
    request.hub.repositories[kind, name] = repository
    return answer(described)


@route("DELETE", "/api/repos/delete")
def delete_repository(request: Request) -> Response:
    kind, name = named_in(request)
    writable(request, f"{kind}s", name)
    del request.hub.repositories[kind, name]
    return answer({})


@route("POST", REPO + r"/branch/(.+)")
def create_branch(request: Request, kinds: str, name: str, branch: str) -> Response:
    repository = writable(request, kinds, name)
    if branch in repository.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{branch}")
    repository.branches[branch] = commit_of(repository, request.json().get("startingPoint") or "main").sha
    return answer({})


@route("POST", REPO + r"/tag/([^/]+)")
def create_tag(request: Request, kinds: str, name: str, revision: str) -> Response:
    repository, tag = writable(request, kinds, name), request.json()["tag"]
    if tag in repository.tags:
        raise HubError(409, f"Tag reference exists already: refs/tags/{tag}")
    repository.tags[tag] = commit_of(repository, revision).sha
    return answer({})


@route("POST", REPO + r"/preupload/([^/]+)")
def preupload(request: Request, kinds: str, name: str, revision: str) -> Response:
    commit = commit_of(writable(request, kinds, name), revision)
    files = []
    for file in request.json()["files"]:
        path = file["path"]
        mode = "lfs" if is_lfs(path, file["size"]) else "regular"
        described = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in commit.files:
            described["oid"] = commit.files[path].etag
        files.append(described)
    return answer({"files": files})


@route("POST", LFS + "/batch")
def lfs_batch(request: Request, kinds: str | None, name: str) -> Response:
    """Where to upload what; objects that are here already get no actions."""
    repository, body = writable(request, kinds, name), request.json()
    objects = []
    for wanted in body["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        described: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repository.objects:
            signed = f"Signature={signature(request, oid)}"
            put = f"{request.hub.cdn_url}/s3/{name}/{oid}?{signed}"
            header = {}
            if size > request.hub.multipart_size and "multipart" in body["transfers"]:
                part = request.hub.part_size
                header = {"chunk_size": str(part)}
                header |= {str(number + 1): f"{put}&partNumber={number + 1}" for number in range(-(-size // part))}
                put = f"{request.hub.url}/api/complete_multipart?{signed}&prefix={name}&oid={oid}"
            verify = {"href": f"{request.hub.url}/{kinds or ''}{name}.git/info/lfs/objects/verify", "header": {}}
            described["actions"] = {"upload": {"href": put, "header": header}, "verify": verify}
        objects.append(described)
    return answer({"transfer": body["transfers"][-1], "objects": objects})


def keep(request: Request, name: str, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, "BadDigest: the content does not match its sha256")
    request.hub.uploaded[name, oid] = data


@route("PUT", r"/s3/([^/]+/[^/]+)/([0-9a-f]{64})")
def put_object(request: Request, name: str, oid: str) -> Response:
    check_signature(request, oid)
    if "partNumber" in request.query:
        number = int(request.query["partNumber"][0])
        request.hub.parts.setdefault((name, oid), {})[number] = request.body
    else:
        keep(request, name, oid, request.body)
    return Response(200, {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("POST", "/api/complete_multipart")
def complete_multipart(request: Request) -> Response:
    """Parts become an object, in the order given, if their ETags are those that the storage answered with."""
    body, name = request.json(), request.query["prefix"][0]
    check_signature(request, body["oid"])
    parts = request.hub.parts.get((name, body["oid"]), {})
    data = b""
    for part in body["parts"]:
        held = parts.get(part["partNumber"])
        if held is None or f'"{hashlib.md5(held).hexdigest()}"' != part["etag"]:
            raise HubError(400, f"InvalidPart: {part['partNumber']}")
        data += held
    keep(request, name, body["oid"], data)
    return answer({"success": True})


@route("POST", LFS + "/verify")
def lfs_verify(request: Request, kinds: str | None, name: str) -> Response:
    repository, body = writable(request, kinds, name), request.json()
    data = request.hub.uploaded.pop((name, body["oid"]), None)
    if data is None or len(data) != body["size"]:
        raise HubError(422, "LFS object was not uploaded as a whole")
    repository.objects[body["oid"]] = Content(data)
    return answer({})


def changed(repository: Repository, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """Apply one line of a commit to the files."""
    path = value["path"]
    if key in ("file", "lfsFile") and ({"..", ".git", ""} & set(path.split("/"))):
        raise HubError(400, f"Invalid path: {path}")
    if key == "file":
        content = Content(base64.b64decode(value["content"]))
        if is_lfs(path, content.size):
            raise HubError(400, f"{path} must be uploaded with LFS")
        files[path] = File(content, False)
    elif key == "lfsFile":
        if value["oid"] not in repository.objects:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(repository.objects[value["oid"]], True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [
            held
            for held in files
            if held == path or (key == "deletedFolder" and held.startswith(f"{path.rstrip('/')}/"))
        ]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for held in gone:
            del files[held]
    else:
        raise HubError(400, f"Unknown operation: {key}")


@route("POST", REPO + r"/commit/([^/]+)")
def create_commit(request: Request, kinds: str, name: str, revision: str) -> Response:
    readable(request, kinds, name)
    if request.flag("create_pr"):
        raise HubError(403, "Discussions are disabled for this repo")
    repository = writable(request, kinds, name)
    parent = commit_of(repository, revision)
    if revision not in repository.branches:
        raise HubError(400, f"Commits go to branches, {revision} is none")
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, parent.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for line in lines[1:]:
        changed(repository, files, line["key"], line["value"])
    author = (request.user or {})["name"]
    commit = repository.commit(files, revision, header["summary"], header.get("description", ""), author)
    url = f"{request.hub.url}/{'datasets/' if kinds == 'datasets' else ''}{name}/commit/{commit.sha}"
    return answer({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})
