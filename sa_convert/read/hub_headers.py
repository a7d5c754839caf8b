"""Headers of safetensors files on the Hub, by requests for their first bytes."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sa_convert.console.progress import progress
from sa_convert.domain.checkpoint import Shard
from sa_convert.errors import CheckpointError
from sa_convert.read.header import PREFIX, header_length, parse_shard
from sa_convert.read.hub_errors import hub_errors
from sa_convert.read.hub_names import HubName

FIRST_BYTES = 50_000
"""What is asked for if nothing tells how long a header is."""

_WORKERS = 16
_TRIES = 3
_TIMEOUT = 30.0
_PER_TENSOR = 96
"""Bytes of a header for each tensor, without its name: dtype, shape and offsets."""


def expected_header(names: list[str]) -> int:
    """About how many bytes a file's header has with these tensors; mostly a little more."""
    return 256 + sum(len(name) + _PER_TENSOR for name in names)


def remote_shards(name: HubName, folder: Path, expected: Mapping[str, int]) -> dict[str, Shard]:
    """Shards by their names in the repo. name: with a commit as its revision. folder: where the files will be.

    expected: the files, and how many bytes to ask for first. Raises CheckpointError, as `header.read_shard` does and
    if the Hub does not answer.
    """
    from huggingface_hub import hf_hub_url

    def read(file: str, first: int) -> Shard:
        url = hf_hub_url(name.repo, file, revision=name.revision)
        return _shard(url, folder / file, first)

    pool = ThreadPoolExecutor(max_workers=_WORKERS)
    try:
        with hub_errors(name), progress(len(expected), "Reading headers", unit="file") as bar:
            shards = {}
            for file, shard in zip(expected, pool.map(read, expected, expected.values()), strict=True):
                shards[file] = shard
                bar.update()
            return shards
    finally:
        pool.shutdown(cancel_futures=True)


def _shard(url: str, file: Path, first: int) -> Shard:
    start, size = _bytes(url, 0, first)
    length = header_length(file, start, size)
    text = start[PREFIX : PREFIX + length]
    if len(text) < length:
        text += _bytes(url, PREFIX + len(text), PREFIX + length)[0]
    if len(text) < length:
        raise CheckpointError(f"{file}: the Hub sends less of the header than it should; try again later.")
    return parse_shard(file, text, size)


def _bytes(url: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes start:stop of a file, fewer if it ends before, and the length of the whole file."""
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
    broken: HTTPError | None = None
    for _ in range(_TRIES):
        content = bytearray()
        with http_stream_backoff("GET", url, max_retries=2, headers=headers, timeout=_TIMEOUT) as response:
            whole = response.headers.get("content-range", "").rpartition("/")[2]
            if response.status_code == 416 and whole == "0":
                return b"", 0
            hf_raise_for_status(response)
            ranged = response.status_code == 206
            size = whole if ranged else response.headers.get("content-length", "")
            skipped = 0 if ranged else start
            try:
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) >= skipped + stop - start:  # who does not know ranges would send all of the file
                        break
            except HTTPError as error:  # the connection dropped while the bytes came
                broken = error
                continue
        found = bytes(content[skipped : skipped + stop - start])
        return found, int(size) if size.isdigit() else start + len(found)
    assert broken is not None
    raise broken
