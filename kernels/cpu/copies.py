"""Work that fills the cache of compiled kernels, done on all cores by copies of this process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from numba.core.compiler_lock import global_compiler_lock

from ...interrupts import deferred

JOBS_EACH = 3  # functions for each process at the least: a copy of this one takes 10 ms, and compiles again what kernels share
END_WITH_PARENT = 1  # of Linux's prctl: the signal that a process gets when its parent ends
WAIT = 10.0  # seconds for which a copy is waited for at least


def side_by_side(jobs: Sequence[Callable[[], Any]], processes: int) -> None:
    """Do jobs that fill the cache in so many processes, copies of this one. Those that a copy cannot do are left to whoever needs them."""
    processes = min(processes, len(jobs) // JOBS_EACH)
    if processes < 2 or sys.platform != "linux":  # elsewhere a copy of a process with threads may not go on
        return
    source, sink = os.pipe()
    os.write(sink, bytes(range(min(256, len(jobs)))))  # each process takes the next number
    os.close(sink)
    children: list[int] = []
    with global_compiler_lock:  # no other thread is compiling when this process is copied
        try:
            with deferred(), warnings.catch_warnings():
                for category in (DeprecationWarning, RuntimeWarning):  # Python's and JAX's, of copies of processes with threads
                    warnings.simplefilter("ignore", category)
                with suppress(OSError):  # no more processes may be made: those that exist do the work
                    for _ in range(processes - 1):
                        children.append(_child(jobs, source))
            start = monotonic()
            _work(jobs, source)
            end = monotonic() + max(WAIT, monotonic() - start)
            while children and monotonic() < end:
                children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
                sleep(0.01)
        finally:
            os.close(source)
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _work(jobs: Sequence[Callable[[], Any]], source: int) -> None:
    while number := os.read(source, 1):
        jobs[number[0]]()


def _child(jobs: Sequence[Callable[[], Any]], source: int) -> int:
    """The number of a process that works on the jobs, and ends."""
    child = os.fork()
    if not child:
        try:
            ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)  # a copy also holds the parent's locks of files
            with open(os.devnull, "w") as sys.stderr:  # the parent says what there is to say
                _work(jobs, source)
        finally:
            os._exit(0)
    return child
