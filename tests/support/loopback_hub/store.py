"""What the loopback Hub holds: contents by their hashes, commits, branches, tags and repositories."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path

CHUNK = 1 << 16
# What goes to LFS by the .gitattributes of a new model repository on the Hub, and the size from which all files do.
_LFS_SUFFIXES = """
.7z .arrow .bin .bz2 .ckpt .ftz .gz .h5 .joblib .mlmodel .model .msgpack .npy .npz .onnx .ot .parquet .pb
.pickle .pkl .pt .pth .rar .safetensors .tar .tflite .tgz .wasm .xz .zip .zst
"""
LFS_SUFFIXES = frozenset(_LFS_SUFFIXES.split())
LFS_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()
EPOCH = datetime(2024, 1, 1, tzinfo=timezone.utc)


def git_hash(kind: str, data: bytes) -> str:
    """The object id that git gives these bytes."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


class Content:
    """The bytes of a file: in memory, on disk (then the file must not change), or a head that zeros follow."""

    def __init__(self, source: bytes | Path, size: int | None = None) -> None:
        self.source = source
        length = len(source) if isinstance(source, bytes) else source.stat().st_size
        self.size = length if size is None else size
        self.virtual = self.size != length

    def read(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size)
        if isinstance(self.source, Path):
            with self.source.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        return self.source[start:stop].ljust(stop - start, b"\0")

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        for position in range(start, stop, CHUNK):
            yield self.read(position, min(position + CHUNK, stop))

    @cached_property
    def sha256(self) -> str:
        # Hundreds of virtual gigabytes are never hashed: head and size identify them.
        digest = hashlib.sha256(f"virtual {self.size} ".encode() if self.virtual else b"")
        for part in [self.source] if isinstance(self.source, bytes) else self.chunks(0, self.size):
            digest.update(part)
        return digest.hexdigest()


@dataclass(frozen=True)
class File:
    """One path of a commit: its content, and whether git holds it or a pointer to it."""

    content: Content
    lfs: bool

    @cached_property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.content.sha256}\nsize {self.content.size}\n"
        ).encode()

    @cached_property
    def oid(self) -> str:
        """What git calls this file: with LFS, its pointer."""
        return git_hash("blob", self.pointer if self.lfs else self.content.read(0, self.content.size))

    @property
    def etag(self) -> str:
        return self.content.sha256 if self.lfs else self.oid


def is_lfs(path: str, size: int) -> bool:
    return size >= LFS_SIZE or (Path(path).suffix in LFS_SUFFIXES and size > 0)


def read_files(source: Path | str | Mapping[str, bytes | Content]) -> dict[str, File]:
    """The files of a folder, or of a mapping from paths in the repository (any text, hostile ones too) to contents."""
    if isinstance(source, Mapping):
        contents = {path: value if isinstance(value, Content) else Content(value) for path, value in source.items()}
    else:
        folder = Path(source)
        contents = {
            path.relative_to(folder).as_posix(): Content(path if path.stat().st_size >= LFS_SIZE else path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return {path: File(content, content.virtual or is_lfs(path, content.size)) for path, content in contents.items()}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass
class Repository:
    """A repository of one kind ("model" or "dataset"); `gated` is False, "auto" or "manual"."""

    kind: str
    name: str
    private: bool = False
    gated: bool | str = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Content] = field(default_factory=dict)  # LFS: what was uploaded, committed or not

    def find(self, revision: str) -> Commit | None:
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def commit(
        self, files: Mapping[str, File], branch: str, title: str, message: str = "", author: str = "tester"
    ) -> Commit:
        """Put these files, all of them, on a branch; a new branch starts at main."""
        parent = self.branches.get(branch) or self.branches.get("main")
        date = (EPOCH + timedelta(seconds=len(self.commits))).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        tree = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        described = "\n".join([self.name, tree, parent or "", author, date, title, message])
        commit = Commit(git_hash("commit", described.encode()), parent, title, message, author, date, dict(files))
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        for file in files.values():
            if file.lfs:
                self.objects.setdefault(file.content.sha256, file.content)
        return commit

    def history(self, commit: Commit | None) -> Iterator[Commit]:
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent or "")


def repository_name_is_valid(name: str) -> bool:
    return re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) is not None
