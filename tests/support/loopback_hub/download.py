"""Files: resolve, the redirects behind it, and ranges."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import quote

from .access import commit_of, opened
from .http import HubError, Request, Response, route
from .store import Content


def ranged(request: Request, content: Content, headers: dict[str, str]) -> Response:
    """The whole content, or with a Range header of one range a part of it."""
    start, stop, status = 0, content.size, 200
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "").strip())
    if match and any(match.groups()):
        first, last = match.groups()
        if first:
            start, stop = int(first), min(int(last) + 1, content.size) if last else content.size
        else:
            start = max(0, content.size - int(last))
        if start >= stop:
            raise HubError(416, "Range Not Satisfiable", Content_Range=f"bytes */{content.size}")
        status = 206
        headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{content.size}"}
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    return Response(status, headers, content.chunks(start, stop), stop - start)


def signature(request: Request, oid: str) -> str:
    return hashlib.sha256(f"{request.hub.secret} {oid}".encode()).hexdigest()[:32]


def check_signature(request: Request, oid: str) -> None:
    if request.query.get("Signature") != [signature(request, oid)]:
        raise HubError(403, "SignatureDoesNotMatch")


@route("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
def resolve(request: Request, kinds: str | None, name: str, revision: str, path: str) -> Response:
    """Both kinds of files redirect, as on the Hub: LFS to signed URLs of another host, others within the Hub."""
    repository = opened(request, kinds, name)
    commit = commit_of(repository, revision)
    file = commit.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
    headers = {
        "X-Repo-Commit": commit.sha,
        "Accept-Ranges": "bytes",
        "X-Linked-Size": str(file.content.size),
        "X-Linked-Etag": f'"{file.etag}"',
        "ETag": f'"{file.etag}"',
    }
    if not file.lfs:
        location = f"/api/resolve-cache/{repository.kind}s/{name}/{commit.sha}/{quote(path, safe='')}"
        return Response(307, {**headers, "Location": location}, f"Temporary Redirect. {location}".encode())
    filename = quote(path.split("/")[-1])
    oid = file.content.sha256
    location = (
        f"{request.hub.cdn_url}/cdn/{name}/{oid}?response-content-disposition="
        f"{quote(f'inline; filename={filename};')}&Signature={signature(request, oid)}"
    )
    return Response(302, {**headers, "Location": location}, f"Found. Redirecting to {location}".encode())


@route("GET", r"/api/resolve-cache/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)")
def resolve_cache(request: Request, kinds: str, name: str, revision: str, path: str) -> Response:
    commit = commit_of(opened(request, kinds, name), revision)
    file = commit.files.get(path)
    if file is None or file.lfs:
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
    return ranged(request, file.content, {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'})


@route("GET", r"/cdn/([^/]+/[^/]+)/([0-9a-f]{64})")
def cdn(request: Request, name: str, oid: str) -> Response:
    check_signature(request, oid)
    for repository in request.hub.repositories.values():
        if repository.name == name and oid in repository.objects:
            return ranged(request, repository.objects[oid], {"ETag": f'"{oid[:32]}"'})
    raise HubError(404, "NoSuchKey")
