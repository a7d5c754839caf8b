"""The HTTP side of the loopback Hub: requests, responses, records, injected faults."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from . import LoopbackHub


@dataclass
class Record:
    """One request as the server saw it; bytes are those of bodies. `dropped`: a fault cut the connection."""

    method: str
    path: str  # with its query, as sent
    host: str  # "hub", or "cdn" for what the Hub leaves to its storage
    range: str | None = None
    token: str | None = None
    proxied: bool = False
    status: int | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    dropped: bool = False


@dataclass
class Fault:
    pattern: re.Pattern[str]
    times: int
    after_bytes: int | None
    status: int | None


@dataclass
class Request:
    """What a route gets: `query` maps to lists of values, `user` is None for an anonymous one."""

    hub: LoopbackHub
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    token: str | None

    @property
    def user(self) -> dict[str, Any] | None:
        return self.hub.users[self.token] if self.token else None

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass
class Response:
    """`body` may be an iterator of chunks; then `length` says how many bytes they hold."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Iterator[bytes] = b""
    length: int | None = None


class HubError(Exception):
    """An answer with a status, and with the headers by which huggingface_hub chooses its exception classes."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **named}


def answer(data: Any, status: int = 200, **headers: str) -> Response:
    named = {"Content-Type": "application/json; charset=utf-8", **headers}
    return Response(status, named, json.dumps(data, default=str).encode())


Route = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Serve paths that match all of the pattern; its groups, unquoted, are the arguments after the request."""

    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


def dispatch(request: Request) -> Response:
    for method, pattern, function in ROUTES:
        match = pattern.fullmatch(request.path)
        if match and method == request.method.replace("HEAD", "GET"):
            return function(request, *(None if group is None else unquote(group) for group in match.groups()))
    request.hub.unanswered.append(f"{request.method} {request.path}")
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    hub: LoopbackHub  # of a subclass made for each server

    def log_message(self, *arguments: object) -> None:
        pass

    def serve(self) -> None:
        parts = urlsplit(self.path)  # a client that takes this server for its proxy sends the whole URL
        path = self.path[self.path.index(parts.netloc) + len(parts.netloc) :] if parts.netloc else self.path
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        self.record = Record(
            self.command,
            path,
            "cdn" if parts.path.startswith(("/cdn/", "/s3/")) else "hub",
            self.headers.get("Range"),
            token if scheme == "Bearer" else None,
            bool(parts.netloc),
        )
        self.hub.requests.append(self.record)
        faults = self.hub.matching_faults(f"{self.command} {unquote(path)}")
        try:
            body = self.read_body(faults)
            if body is None:
                return self.drop()
            request = Request(
                self.hub, self.command, parts.path, parse_qs(parts.query), self.headers, body, self.record.token
            )
            failed = next((fault for fault in faults if fault.status and self.hub.use(fault)), None)
            try:
                if failed:
                    raise HubError(int(failed.status or 0), "Injected failure")
                if self.record.host == "hub" and request.token and request.token not in self.hub.users:
                    raise HubError(401, "Invalid credentials in Authorization header")
                with self.hub.lock:
                    response = dispatch(request)
            except HubError as error:
                response = answer({"error": error.message}, error.status, **error.headers)
            self.send(response, faults)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def pieces(self) -> Iterator[bytes]:
        """The body of the request, of a known length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)
            yield piece

    def read_body(self, faults: Iterable[Fault]) -> bytes | None:
        """All of the body, or None if a fault cuts it."""
        body = bytearray()
        for piece in self.pieces():
            body += piece
            for fault in faults:
                if fault.after_bytes is not None and len(body) > fault.after_bytes and self.hub.use(fault):
                    self.record.bytes_received = fault.after_bytes
                    return None
            self.record.bytes_received = len(body)
        return bytes(body)

    def send(self, response: Response, faults: Iterable[Fault]) -> None:
        chunks = [response.body] if isinstance(response.body, bytes) else response.body
        length = len(response.body) if isinstance(response.body, bytes) else int(response.length or 0)
        head_only = self.command == "HEAD"
        cut = None
        if not head_only and not self.record.bytes_received and response.status < 300:
            for fault in faults:
                if fault.after_bytes is not None and fault.after_bytes < length and self.hub.use(fault):
                    cut = fault.after_bytes
        self.record.status = response.status
        self.send_response(response.status)
        for name, value in {"Content-Length": str(length), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in () if head_only else chunks:
            part = chunk if cut is None else chunk[: cut - self.record.bytes_sent]
            self.record.bytes_sent += len(part)  # before it is written: a client that has all of it may look at once
            self.wfile.write(part)
            if cut is not None and self.record.bytes_sent >= cut:
                return self.drop()

    def drop(self) -> None:
        self.record.dropped = True
        self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here; anything else is one, and printed."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def start(hub: LoopbackHub, port: int = 0) -> Server:
    server = Server(("127.0.0.1", port), type("HubHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server
