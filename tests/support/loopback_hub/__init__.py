"""A small Hub on the loopback interface: the endpoints that huggingface_hub calls, for tests without a network.

Written against huggingface_hub 2.4 without Xet (HF_HUB_DISABLE_XET=1); 0.36 works, too. Downloads by resolve, redirects
and ranges, uploads by LFS. What LFS holds comes from, and goes to, another port, as the real one leaves it to other
hosts.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from . import card, download, metadata, upload  # noqa: F401 - their routes
from .http import Fault, Record, start
from .store import Commit, Content, File, Repository, read_files

__all__ = ["READ_TOKEN", "WRITE_TOKEN", "Commit", "Content", "LoopbackHub", "Record", "safetensors_head"]

WRITE_TOKEN = "hf_LoopbackTokenThatWrites"
READ_TOKEN = "hf_LoopbackTokenThatReads"
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "BOOL": 1}


def safetensors_head(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The first bytes of a safetensors file of these tensors (type, shape), and the size of all of it, for
    `virtual_file`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start_at, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start_at, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, 8 + len(encoded) + end


class LoopbackHub:
    """A running Hub, best used as a context manager; everything it holds is gone afterwards.

    `users` maps tokens to {"name", "role": "write" or "read", "orgs": [...], "gated": [repositories granted]}.
    `requests` are the records of all requests, `unanswered` those of them that no endpoint serves. `page_size` is
    that of listings; LFS objects larger than `multipart_size` are uploaded in parts of `part_size` bytes.
    """

    def __init__(self, port: int = 0) -> None:
        self.lock = threading.RLock()
        self.secret = secrets.token_hex(8)
        self.page_size = 1000
        self.multipart_size, self.part_size = 64 << 20, 16 << 20
        self.users: dict[str, dict[str, Any]] = {
            WRITE_TOKEN: {"name": "tester", "role": "write", "orgs": ["org"], "gated": []},
            READ_TOKEN: {"name": "reader", "role": "read", "orgs": [], "gated": []},
        }
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploaded: dict[tuple[str, str], bytes] = {}
        self.parts: dict[tuple[str, str], dict[int, bytes]] = {}
        self.requests: list[Record] = []
        self.unanswered: list[str] = []
        self.faults: list[Fault] = []
        self.servers = [start(self, port), start(self)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self) -> LoopbackHub:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, tmp_cache: Path, token: str | None = None) -> dict[str, str]:
        """What a process needs, on top of os.environ, to use this Hub, and an empty cache below `tmp_cache`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(tmp_cache),
            "HF_HUB_CACHE": str(tmp_cache / "hub"),
            "HF_MODULES_CACHE": str(tmp_cache / "modules"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def add_repo(
        self,
        name: str,
        folder: Path | str | Mapping[str, bytes | Content],
        revision: str = "main",
        private: bool = False,
        gated: bool | str = False,
        repo_type: str = "model",
    ) -> str:
        """A repository whose first commit, whose id is returned, holds a folder or {path: content}."""
        gated = "manual" if gated is True else gated
        self.repositories[repo_type, name] = Repository(repo_type, name, private, gated)
        return self.add_revision(name, folder, revision, "initial commit", repo_type)

    def add_revision(
        self,
        name: str,
        folder: Path | str | Mapping[str, bytes | Content],
        revision: str = "main",
        title: str = "New revision",
        repo_type: str = "model",
    ) -> str:
        """A commit that replaces all files of a branch, which may be new; returns its id."""
        with self.lock:
            return self.repositories[repo_type, name].commit(read_files(folder), revision, title).sha

    def add_tag(self, name: str, tag: str, revision: str = "main") -> None:
        repository = self.repositories["model", name]
        repository.tags[tag] = self.commit(name, revision).sha

    def virtual_file(self, name: str, path: str, header_bytes: bytes, size: int, revision: str = "main") -> str:
        """Commit a file of any size that exists only as its first bytes; zeros follow. Returns the commit's id."""
        file = File(Content(header_bytes, size), True)
        with self.lock:
            files = {**self.commit(name, revision).files, path: file}
            return self.repositories["model", name].commit(files, revision, f"Add {path}").sha

    def commit(self, name: str, revision: str = "main") -> Commit:
        commit = self.repositories["model", name].find(revision)
        if commit is None:
            raise KeyError(f"{name} has no revision {revision}")
        return commit

    def commits(self, name: str, revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first."""
        return list(self.repositories["model", name].history(self.commit(name, revision)))

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """All contents at a revision (no virtual ones, please)."""
        files = self.commit(name, revision).files
        return {path: file.content.read(0, file.content.size) for path, file in sorted(files.items())}

    def fail(self, pattern: str, times: int = 1, after_bytes: int | None = None, status: int | None = None) -> None:
        """Make requests fail whose "METHOD /path?query" (unquoted) the pattern is found in, `times` times.

        `after_bytes`: the connection is cut in the body, of the request if it has one, else of the response, after so
        many bytes; shorter bodies, redirects and HEAD requests pass. `status`: that answer, and nothing is done.
        """
        if (after_bytes is None) == (status is None):
            raise ValueError("Give after_bytes or status.")
        self.faults.append(Fault(re.compile(pattern), times, after_bytes, status))

    def matching_faults(self, described: str) -> list[Fault]:
        with self.lock:
            return [fault for fault in self.faults if fault.times > 0 and fault.pattern.search(described)]

    def use(self, fault: Fault) -> bool:
        """Whether this fault has a time left, which is then spent."""
        with self.lock:
            fault.times -= 1
            return fault.times >= 0

    @property
    def bytes_sent(self) -> int:
        return sum(record.bytes_sent for record in self.requests)

    @property
    def bytes_received(self) -> int:
        return sum(record.bytes_received for record in self.requests)

    def reset(self) -> None:
        """Forget requests and faults; repositories stay."""
        self.requests.clear()
        self.unanswered.clear()
        self.faults.clear()
