"""Interrupts (Ctrl-C, and for the command line SIGTERM) that are not lost.

Python raises KeyboardInterrupt wherever the main thread is at that moment. Inside a callback from C, as while Numba compiles, the exception
is only printed, and while a module is being imported, it may become another one. So the handler here keeps in mind that a signal came. It
raises KeyboardInterrupt at once, but inside a `deferred` block only at the block's end; and `check_interrupt`, which is called at each
training step, raises it again if it was swallowed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

SAME = 0.5  # seconds in which a second signal counts as the first: some programs send it to a process and again to its group


class _Received:
    """The state of the handler. number: of the first signal, or 0; time: when it came; deferred: how many `deferred` blocks are open."""

    number, time, deferred = 0, 0.0, 0
    again: Any = signal.SIG_DFL  # the handler of a second signal


_received = _Received()


def received() -> int:
    """The number of the signal that came in the current `interruptible` block, or 0."""
    return _received.number


def check_interrupt() -> None:
    """Raises KeyboardInterrupt in the main thread if a signal came, in case that an earlier KeyboardInterrupt was swallowed."""
    if _received.number and _in_main_thread():
        raise KeyboardInterrupt


@contextmanager
def interruptible(*numbers: int, again: Any = signal.default_int_handler) -> Iterator[None]:
    """Inside, the first of these signals raises KeyboardInterrupt; a second one is handled by `again`.

    It changes nothing outside the main thread, inside another such block, and for signals that somebody else handles or ignores.
    """
    ours = [n for n in numbers if signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)]
    if not ours or not _in_main_thread():
        yield
        return
    _received.number, _received.again = 0, again
    before = {number: signal.signal(number, _handle) for number in ours}
    try:
        yield
    finally:
        _received.deferred += 1  # a first signal that comes now is too late
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.number, _received.deferred = 0, _received.deferred - 1


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, KeyboardInterrupt would be lost or do harm: it is raised at the end. A second signal does not wait."""
    if not _in_main_thread():
        yield
        return
    with interruptible(signal.SIGINT):
        _received.deferred += 1
        try:
            yield
        finally:
            _received.deferred -= 1
        check_interrupt()


def _handle(number: int, frame: FrameType | None) -> None:
    now = monotonic()
    if not _received.number:
        _received.number, _received.time = number, now
        if not _received.deferred:
            raise KeyboardInterrupt
    elif now - _received.time > SAME:
        signal.signal(number, _received.again)
        signal.raise_signal(number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
