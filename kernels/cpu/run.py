"""Running compiled kernels: one parallel loop over the bands, shared by all kernels, and the replay of a list of calls without Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from math import inf
from threading import Lock, get_ident
from time import monotonic
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import get_num_threads, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compile import compiled_loop
from .llvm import I32, I64


@intrinsic
def call_entry(typing_context, address, band, table):
    """Run one band of a compiled kernel."""

    def generate(context, builder, signature, values):
        function = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [I64, I64]).as_pointer())
        builder.call(function, values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _exchange_threads(typing_context, number):
    """Set the number of threads for launches of this thread; returns the previous one. Numba's own function cannot be cached."""

    def generate(context, builder, signature, values):
        getter = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, []), "get_num_threads")  # returns a C int
        setter = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [I32]), "set_num_threads")
        previous = builder.trunc(builder.call(getter, []), I32)
        builder.call(setter, [builder.trunc(values[0], I32)])
        return builder.sext(previous, I64)

    return types.int64(types.int64), generate


def _run(address, bands, table):
    if bands == 1:
        call_entry(address, 0, table)
    else:
        for band in prange(bands):
            call_entry(address, band, table)


def _replay(addresses, bands, tables, number):
    previous = _exchange_threads(number)  # here it takes nanoseconds, from Python microseconds
    for i in range(len(addresses)):
        _run_in_parallel(addresses[i], bands[i], tables[i])
    _exchange_threads(previous)


def _run_alone(address, bands, table):
    for band in range(bands):
        call_entry(address, band, table)


def _replay_alone(addresses, bands, tables, number):
    for i in range(len(addresses)):
        for band in range(bands[i]):
            call_entry(addresses[i], band, tables[i])


@contextmanager
def _short_spin() -> Iterator[None]:
    """Context manager: GNU OpenMP, if loaded inside, lets idle threads sleep after about 0.1 ms instead of several ms of busy waiting
    that slows down other processes. The user's own settings take precedence."""
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


RUN, REPLAY = "void(int64, int64, int64)", "void(int64[::1], int64[::1], int64[::1], int64)"

with _short_spin():  # Numba loads the threading layer with the first parallel function
    _run_in_parallel = compiled_loop(RUN, _run, parallel=True, nogil=True)
_replay_in_parallel = compiled_loop(REPLAY, _replay, nogil=True)


def most_threads() -> int:
    """The maximal number of threads: the cores available to this process, or NUMBA_NUM_THREADS."""
    return numba.config.NUMBA_NUM_THREADS


SHARED = 0.1  # seconds: how long a thread of Python counts as a caller after its last replay


class _Loops:
    """The loops that run kernels in this process.

    A child of fork has no threads of its own, and GNU OpenMP ends it at the first parallel loop: there, one thread runs all bands, with the
    same results. Numba's own layer "workqueue" takes one caller at a time.

    Threads of Python that replay calls at the same time share the cores. OpenMP gives each of them a team of threads, and as soon as all
    teams together are larger than the number of cores, threads sleep at each launch, which takes 10 to 100 times as long as the launch.
    """

    def __init__(self) -> None:
        self.run, self.cores = _run_in_parallel, most_threads()
        self.lock: Any = Lock() if numba.threading_layer() == "workqueue" else nullcontext()
        self.last: dict[int, float] = {}  # when each caller replayed calls last; while it does, infinity

    def after_fork(self) -> None:
        self.run, self.cores = compiled_loop(RUN, _run_alone, nogil=True), 1
        self.lock, self.last = nullcontext(), {}

    def share(self, caller: int) -> int:
        """The number of cores for this caller, which begins to replay calls now."""
        since = monotonic() - SHARED
        for other, time in list(self.last.items()):
            if time < since:
                self.last.pop(other, None)
        self.last[caller] = inf
        return max(1, self.cores // len(self.last))


@cache
def _replay_alone_compiled() -> Any:
    return compiled_loop(REPLAY, _replay_alone, nogil=True)


_loops = _Loops()
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def loops() -> _Loops:
    """The loops that run kernels in this process; in a child of fork they are compiled when they are first needed."""
    global _forked
    if _forked:
        _forked = False
        _loops.after_fork()
    return _loops


def run_bands(address: int, bands: int, table: int) -> None:
    """Run all bands of a compiled kernel now: address of its entry, and of the table of its arguments."""
    here = loops()
    with here.lock:
        here.run(address, bands, table)


def replay(entries: np.ndarray, bands: np.ndarray, addresses: np.ndarray, number: int) -> None:
    """Run a list of calls, each with its entry, bands and table, shared among at most so many threads."""
    here, caller = loops(), get_ident()
    try:
        number = min(number, here.share(caller))
        if number == 1:
            _replay_alone_compiled()(entries, bands, addresses, number)
        else:
            with here.lock:
                _replay_in_parallel(entries, bands, addresses, number)
    finally:
        here.last[caller] = monotonic()


def threads() -> int:
    """The number of threads that the bands of a kernel are distributed to."""
    return get_num_threads()


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Context manager: kernels that this thread launches or records run on `number` threads, 1 ... most_threads()."""
    previous = get_num_threads()
    set_num_threads(number)
    try:
        yield
    finally:
        set_num_threads(previous)
