"""The file of a session: safetensors, whose header says which model filled the cache and how its layers are made.

    8 bytes, header   __metadata__: format, model, plan, dtype, revision, transformers, layers, notes
    0.keys ...        the tensors of the cache, layer by layer, each as many bytes as the cache shows of it
    tokens, mask      (B, T) int32, and (B, T) bool if rows are padded

A file is written under a hidden name beside its own, synced, and renamed: whatever ends the writer, the earlier file or
the new one is there.
"""

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sa_convert.errors import OutputError, SessionError

FORMAT = "sa-convert session 1"

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

_MOST_HEADER = 100_000_000
"""Bytes of a header that safetensors reads."""


def write(file: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> int:
    """Write tensors in this order, those of large numbers first, so that all are aligned. Returns the file's bytes.

    One tensor at a time comes to the CPU and is made contiguous. Raises OutputError if the file cannot be written, and
    SessionError if something else is there already.
    """
    check_replaceable(file)
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        states = tensors[name]
        start, end = end, end + states.numel() * states.element_size()
        described[name] = {"dtype": _NAMES[states.dtype], "shape": list(states.shape), "data_offsets": [start, end]}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with _renamed(file) as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            states = tensors[name].detach().cpu().contiguous()
            if states.numel():
                out.write(states.flatten().view(torch.uint8).numpy().data)
    return 8 + len(header) + end


def metadata_of(file: Path) -> dict[str, str]:
    """What the header says. Raises SessionError if there is no file, none of ours, or a part of one."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            content = opened.read(size) if size <= _MOST_HEADER else b""
            length = opened.seek(0, os.SEEK_END)
    except OSError as error:
        raise SessionError(f"{file}: cannot be read: {error.strerror}.") from error
    try:
        described = json.loads(content)
        metadata = described.pop("__metadata__")
        end = max((entry["data_offsets"][1] for entry in described.values()), default=0)
        ours = metadata["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SessionError(f"{file}: is no session of sa-convert, or one that was cut short.") from error
    if ours != FORMAT:
        raise SessionError(f"{file}: is no session that this sa-convert reads ({str(ours)[:40]!r}).")
    if length != 8 + size + end:
        raise SessionError(
            f"{file}: has {length} bytes and should have {8 + size + end}: it was cut short, so begin anew."
        )
    return {str(key): str(value) for key, value in metadata.items()}


def check_replaceable(file: Path) -> None:
    """Raises SessionError if there is something that is no session, which must not be lost."""
    if os.path.lexists(file):
        try:
            metadata_of(file)
        except SessionError as error:
            if file.is_file() and file.stat().st_size == 0:
                return
            raise SessionError(f"{file}: is there already and no whole session: give another name.") from error


@contextmanager
def _renamed(file: Path) -> Iterator[BinaryIO]:
    """A new file beside `file` that takes its name at the end. It is locked while somebody writes it: those that
    nobody does are left of killed writers, and removed."""
    file = Path(os.path.abspath(file))
    try:
        _remove_leftovers(file)
        part, out = _new_part(file)
        try:
            with out:
                yield out
                out.flush()
                os.fsync(out.fileno())
                os.replace(part, file)
            _sync_folder(file.parent)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise OutputError(f"{file}: the session cannot be written: {reason}.") from error


def _new_part(file: Path) -> tuple[Path, BinaryIO]:
    while True:
        part = file.parent / f".{file.name}.sa-convert-{secrets.token_hex(4)}"
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if _locked(part, descriptor):
            return part, os.fdopen(descriptor, "wb")
        os.close(descriptor)  # another writer took it for a leftover before it was locked


def _remove_leftovers(file: Path) -> None:
    pattern = re.compile(re.escape(f".{file.name}.sa-convert-") + "[0-9a-f]{8}")
    for part in [file.parent / name for name in os.listdir(file.parent) if pattern.fullmatch(name)]:
        with suppress(OSError):
            descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _locked(part, descriptor):
                    part.unlink()
            finally:
                os.close(descriptor)


def _locked(part: Path, descriptor: int) -> bool:
    """Whether the lock of an open file is ours now, and the file still there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(part))
    except (BlockingIOError, FileNotFoundError):
        return False


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a power cut, too. Some file systems do not let folders be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def names_in_order(names: Sequence[str]) -> list[str]:
    """Names of tensors as layers need them."""

    def place(name: str) -> tuple[int, str]:
        number = name.partition(".")[0]
        return (int(number) if number.isdigit() else -1), name

    return sorted(names, key=place)
