"""The processes of one `accelerate launch` or `torchrun`, which share the calibration sequences.

Every process runs the same search. It sees a part of the sequences, and what is summed or measured is put together, so
that all take the same decisions. Only the first writes, and tells what is done. Whatever ends one of them ends all,
with one line of error and one exit status. Outside `launched` there is one process, which sees everything.
"""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from sa_convert.errors import EndedElsewhere, SaConvertError
from sa_convert.output.signals import termination_as_exit

T = TypeVar("T")
K = TypeVar("K")

PATIENCE = timedelta(days=30)
"""For which processes wait for each other: the first one validates and uploads while the others wait."""

AFTER_THE_END = 20.0
"""Seconds that the first process gives the others to end by themselves."""

_ENDED, _CLAIMED, _STATUS = "ended", "claimed", "status"


@dataclass(frozen=True)
class Launch:
    """rank: the number of this process. store: what is told by name, whoever still lives."""

    rank: int
    count: int
    store: Any


_LAUNCH: ContextVar[Launch | None] = ContextVar("the launch that this process belongs to", default=None)


_BROKEN: ContextVar[bool] = ContextVar("whether processes of a launch have ended before it was done", default=False)


def broken() -> bool:
    """Whether other processes may be gone: then the backend would wait for them in vain as the interpreter ends."""
    return _BROKEN.get()


def rank() -> int:
    """The number of this process."""
    launch = _LAUNCH.get()
    return launch.rank if launch else 0


def count() -> int:
    """Of the processes that share the work."""
    launch = _LAUNCH.get()
    return launch.count if launch else 1


def first() -> bool:
    """Whether this process writes and tells."""
    return rank() == 0


def on_this_machine() -> int:
    """How many of them share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def own_device(asked: str) -> str:
    """The device of this process, if the user asks for such a one: of several GPUs, each process has its own."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return "cpu"
    if asked in ("auto", "cuda") and torch.cuda.is_available() and (number := os.environ.get("LOCAL_RANK")):
        return f"cuda:{number}"
    return asked


def shared(items: Iterable[T], passed: Callable[[T], None] | None = None) -> Iterator[tuple[int, T]]:
    """The items that this process has to see, with their numbers. passed: called with each of the others in its
    turn."""
    for number, item in enumerate(items):
        if number % count() == rank():
            yield number, item
        elif passed is not None:
            passed(item)


def in_share(items: Sequence[Any]) -> int:
    """How many of these items `shared` gives."""
    return len(range(rank(), len(items), count()))


def gathered(value: T) -> list[T]:
    """What every process gives, in their order."""
    if count() == 1:
        return [value]
    import torch
    import torch.distributed as distributed

    mine = _packed(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    _wait_for(distributed.all_gather(sizes, torch.tensor([len(mine)]), async_op=True))
    room = max(map(int, sizes))
    parts = [torch.zeros(room, dtype=torch.uint8) for _ in sizes]
    _wait_for(distributed.all_gather(parts, torch.nn.functional.pad(mine, (0, room - len(mine))), async_op=True))
    return [_unpacked(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, which alone makes it."""
    if count() == 1:
        return make()
    import torch
    import torch.distributed as distributed

    made = make() if first() else None
    content = _packed(made)
    size = torch.tensor([len(content)])
    _wait_for(distributed.broadcast(size, 0, async_op=True))
    content = content if first() else torch.zeros(int(size), dtype=torch.uint8)
    _wait_for(distributed.broadcast(content, 0, async_op=True))
    found: T = _unpacked(content)
    return found


def merged(parts: Mapping[K, T]) -> dict[K, T]:
    """The entries of all processes. No two have the same key."""
    return {key: value for one in gathered(dict(parts)) for key, value in one.items()}


def listed(parts: Mapping[K, list[T]]) -> dict[K, list[T]]:
    """The lists of all processes behind each other, key by key."""
    found: dict[K, list[T]] = {}
    for one in gathered(dict(parts)):
        for key, values in one.items():
            found.setdefault(key, []).extend(values)
    return found


def summed(parts: Mapping[K, Any]) -> dict[K, Any]:
    """The sums over all processes, key by key, of numbers or of tensors of one shape on the CPU. A process that lacks a
    key adds nothing."""
    if count() == 1:
        return dict(parts)
    import torch
    import torch.distributed as distributed

    kinds = {key: (part.shape, part.dtype) if torch.is_tensor(part) else None for key, part in parts.items()}
    known: dict[K, Any] = {}
    for one in gathered(kinds):
        for key, kind in one.items():
            known[key] = known.get(key) or kind  # a sum that has not begun is a number
    # In float64, so that it does not matter how the sequences are spread.
    totals = {key: torch.zeros(kind[0] if kind else (), dtype=torch.float64) for key, kind in known.items()}
    for key, part in parts.items():
        totals[key] += part
    flat = torch.cat([total.flatten() for total in totals.values()]) if totals else torch.zeros(0)
    _wait_for(distributed.all_reduce(flat, async_op=True))
    sums = dict(zip(totals, flat.split([total.numel() for total in totals.values()]), strict=True))
    return {key: sums[key].view(kind[0]).to(kind[1]) if kind else float(sums[key]) for key, kind in known.items()}


@contextmanager
def launched() -> Iterator[None]:
    """While open, this process is one of its launch, if there is one. At the end all wait for each other.

    Raises what ends this process; EndedElsewhere, with the exit status of all, if another one has told what is wrong.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or "RANK" not in os.environ:
        yield
        return
    import torch.distributed as distributed

    launch = _join()
    token = _LAUNCH.set(launch)
    try:
        with _silent_unless(launch.rank == 0), termination_as_exit():
            yield
            gathered(None)
    except BaseException as error:
        ended = _ended(launch, error)
        if ended is error:
            raise
        raise ended from None
    else:
        distributed.destroy_process_group()
    finally:
        _LAUNCH.reset(token)


def _join() -> Launch:
    import torch
    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, number, size = next(rendezvous("env://"))
        on_gpus = torch.cuda.is_available() and own_device("auto") != "cpu" and distributed.is_nccl_available()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=distributed.PrefixStore("sa_convert", store),
            rank=number,
            world_size=size,
            timeout=PATIENCE,
        )
    except Exception as error:  # ValueError, RuntimeError, DistNetworkError: by what is missing
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SaConvertError(f"The processes of the launch do not find each other: {told}") from error
    return Launch(number, size, distributed.PrefixStore("sa_convert ends", store))


def _packed(value: Any) -> Any:
    """Bytes as a tensor."""
    import torch

    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(content: Any) -> Any:
    return pickle.loads(content.numpy().tobytes())  # from a process of ours


def _wait_for(work: Any) -> None:
    """Until a collective is done. Raises EndedElsewhere if another process is gone and has said why; SaConvertError if
    it has not."""
    launch = _LAUNCH.get()
    assert launch is not None
    pause = 0.001
    try:
        while not work.is_completed():
            if launch.store.check([_STATUS]):
                raise EndedElsewhere(int(launch.store.get(_STATUS)))
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        work.wait()
    except SaConvertError:
        raise
    except Exception as error:  # of many types, by backend
        status = None
        with suppress(Exception):
            launch.store.wait([_STATUS], timedelta(seconds=AFTER_THE_END / 2))
            status = int(launch.store.get(_STATUS))
        if status is not None:
            raise EndedElsewhere(status) from None
        raise SaConvertError(
            "Another process of the launch has ended without a word, maybe for want of memory: use fewer processes, or "
            "--layer-by-layer."
        ) from error


def _ended(launch: Launch, error: BaseException) -> BaseException:
    """Tell the others that this process ends, and let them go first; what it is to raise."""
    status = getattr(error, "exit_code", 1)
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    with suppress(Exception):
        if not isinstance(error, EndedElsewhere):
            if launch.store.add(_CLAIMED, 1) == 1:
                launch.store.set(_STATUS, str(status))
            else:
                error = EndedElsewhere(int(launch.store.get(_STATUS)))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all that are left; each has its own status
    with suppress(Exception):
        _BROKEN.set(True)
        launch.store.add(_ENDED, 1)
        if launch.rank == 0:  # which may hold the store
            until = time.monotonic() + AFTER_THE_END
            while launch.store.add(_ENDED, 0) < launch.count and time.monotonic() < until:
                time.sleep(0.05)
        elif not isinstance(error, EndedElsewhere):
            time.sleep(1.0)  # the launcher ends the others as soon as this one is gone
    return error


@contextmanager
def _silent_unless(speaks: bool) -> Iterator[None]:
    if speaks:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        yield
    sys.stdout.flush()
