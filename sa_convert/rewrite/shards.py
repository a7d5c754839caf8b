"""Writes the safetensors files of a converted model by copying ranges, and columns, of the base's files."""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

from sa_convert.domain.checkpoint import Checkpoint, TensorEdit
from sa_convert.errors import CheckpointError
from sa_convert.output.signals import undisturbed
from sa_convert.read.folder import INDEX
from sa_convert.rewrite.columns import Columns, copy_columns
from sa_convert.rewrite.layout import ShardPlan, plan_shard
from sa_convert.rewrite.ranges import SourceTooShortError, copy_range, reserve

_WORKERS = 4
"""Shards written at a time. More than there are cores, since the kernel makes some of them wait."""


@dataclass(frozen=True)
class Written:
    """The weights of a converted model. files: bytes of each safetensors file by name.

    tensor_bytes: of all tensors, without headers. parameters: elements of all tensors.
    """

    files: Mapping[str, int]
    tensor_bytes: int
    parameters: int

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


class _StoppedError(Exception):
    """Another shard failed, or the user had enough."""


def plan_shards(checkpoint: Checkpoint, edits: Mapping[str, TensorEdit]) -> tuple[ShardPlan, ...]:
    """The new files, in the order of the base's. Raises CheckpointError for rows that cannot be taken apart."""
    plans = tuple(plan_shard(shard, edits) for shard in checkpoint.shards)
    present = {tensor.name for shard in checkpoint.shards for tensor in shard.tensors}
    absent = {edit.after or name for name, edit in edits.items()} - present
    if absent:
        raise ValueError(f"edits of tensors that the checkpoint does not have: {', '.join(sorted(absent))}")
    names = [piece.name for plan in plans for piece in plan.pieces]
    if len(set(names)) < len(names):
        raise ValueError("two tensors get the same name")
    return plans


def write_shards(
    checkpoint: Checkpoint, edits: Mapping[str, TensorEdit], folder: Path, advance: Callable[[int], None]
) -> Written:
    """Write the edited weights into `folder`: the same files, order, dtypes and metadata as the base's, and its index.

    A file that keeps no tensor is still written. advance: called with bytes as they are written, in this thread.
    Raises CheckpointError if the base cannot be read, OSError if the result cannot be written.
    """
    plans = plan_shards(checkpoint, edits)
    names = [shard.file.relative_to(checkpoint.folder).as_posix() for shard in checkpoint.shards]
    _run([(plan, folder / name) for plan, name in zip(plans, names, strict=True)], advance)
    pieces = [piece for plan in plans for piece in plan.pieces]
    written = Written(
        files={name: (folder / name).stat().st_size for name in names},
        tensor_bytes=sum(piece.bytes for piece in pieces),
        parameters=sum(piece.elements for piece in pieces),
    )
    if checkpoint.index is not None:
        index = _new_index(checkpoint, checkpoint.index, edits, written)
        (folder / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return written


def _run(jobs: Iterable[tuple[ShardPlan, Path]], advance: Callable[[int], None]) -> None:
    """Write all files in threads. An error, or an interrupt in this thread, stops all of them within a chunk."""
    moved: SimpleQueue[int | Future[None]] = SimpleQueue()
    stop = Event()

    def report(count: int) -> None:
        if stop.is_set():
            raise _StoppedError
        moved.put(count)

    pool = ThreadPoolExecutor(max_workers=_WORKERS)
    try:
        futures = [pool.submit(_write_shard, plan, file, report) for plan, file in jobs]
        for future in futures:
            future.add_done_callback(moved.put)
        running = len(futures)
        while running:
            news = moved.get()
            if isinstance(news, int):
                advance(news)
            else:
                news.result()
                running -= 1
    finally:
        stop.set()
        with undisturbed():  # a thread that still writes would write into a folder that is being removed
            pool.shutdown(cancel_futures=True)


def _write_shard(plan: ShardPlan, file: Path, report: Callable[[int], None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened, file.open("xb") as target:
        reserve(target.fileno(), plan.bytes)
        target.write(plan.header)
        target.flush()
        report(len(plan.header))
        position = len(plan.header)
        sources = {path: opened.enter_context(path.open("rb")) for path in {part.file for part in plan.parts}}
        for part in plan.parts:
            source = sources[part.file].fileno()
            try:
                if isinstance(part, Columns):
                    copy_columns(part, source, target.fileno(), position, report)
                else:
                    copy_range(source, part.start, part.stop, target.fileno(), position, report)
            except SourceTooShortError:
                raise CheckpointError(
                    f"{part.file}: became shorter while it was copied; leave the model alone and run again."
                ) from None
            position += part.bytes


def _new_index(
    checkpoint: Checkpoint, index: Mapping[str, Any], edits: Mapping[str, TensorEdit], written: Written
) -> dict[str, Any]:
    """The base's index with the names and sizes of the new files; order and other keys stay."""
    found = index.get("metadata")
    metadata = dict(found) if isinstance(found, Mapping) else {}
    metadata["total_size"] = written.tensor_bytes
    if isinstance(metadata.get("total_parameters"), int):
        # Not always the number of elements: quantised models count otherwise. What goes is plain weights.
        before = sum(tensor.elements for tensor in checkpoint.tensors.values())
        metadata["total_parameters"] -= before - written.parameters
    weight_map, added = {}, {name: edit.after for name, edit in edits.items() if edit.after is not None}
    for name, file in index["weight_map"].items():
        edit = edits.get(name, TensorEdit())
        if not edit.drops:
            weight_map[edit.name or name] = file
        weight_map |= {new: file for new, after in added.items() if after == name}
    return {**index, "metadata": metadata, "weight_map": weight_map}
