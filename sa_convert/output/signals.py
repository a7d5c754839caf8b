"""Signals during work that must not be left half done."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


_ALARMS = [signal.SIGALRM] if hasattr(signal, "SIGALRM") else []
_AGAIN = 0.02
"""Seconds after which an exit that Python dropped is raised again."""


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit here, so that `finally` runs. Only the main thread can see to that.

    Python drops what is raised while it frees an object or ends a thread, and prints a traceback: nothing is printed
    here, and SystemExit is raised again soon after.
    """
    received: list[int] = []
    report = sys.unraisablehook

    def leave(number: int, frame: FrameType | None) -> None:
        for other in _TERMINATING:  # one is enough: the next would break into the cleaning before it is undisturbed
            if signal.getsignal(other) is leave:
                signal.signal(other, signal.SIG_IGN)
        received.append(number)
        raise SystemExit(128 + number)

    def leave_again(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + received[0])

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if not received:
            report(unraisable)
        elif unraisable.exc_type is SystemExit and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, leave_again)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)

    sys.unraisablehook = dropped
    try:
        with _handlers([number for number in _TERMINATING if signal.getsignal(number) is signal.SIG_DFL], leave):
            yield
    finally:
        if received:  # the process ends, and what it drops on its way is no news
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            sys.unraisablehook = report
    if received:
        raise SystemExit(128 + received[0])


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP are ignored here, and an exit that waits to be raised again: what runs is short, and
    worse when half done."""
    with _handlers([signal.SIGINT, *_TERMINATING, *_ALARMS], signal.SIG_IGN):
        yield


@contextmanager
def _handlers(numbers: list[signal.Signals], handler: "signal._HANDLER") -> Iterator[None]:
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
