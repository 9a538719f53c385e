"""How compiled kernels run: one small parallel loop over the bands of any of them, and the replay of a list of calls without Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numba
from llvmlite import ir
from numba import get_num_threads, njit, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compile import cached
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
    """Set how many threads share what this thread launches; gives how many did. Code that calls Numba's own for it cannot be cached."""

    def generate(context, builder, signature, values):
        ask = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, []), "get_num_threads")  # a C int
        tell = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [I32]), "set_num_threads")
        before = builder.trunc(builder.call(ask, []), I32)
        builder.call(tell, [builder.trunc(values[0], I32)])
        return builder.sext(before, I64)

    return types.int64(types.int64), generate


def _run(address, bands, table):
    if bands == 1:
        call_entry(address, 0, table)
    else:
        for band in prange(bands):
            call_entry(address, band, table)


def _replay(addresses, bands, tables, number):
    before = _exchange_threads(number)  # here, for it takes nanoseconds, from Python microseconds
    for i in range(len(addresses)):
        run_bands(addresses[i], bands[i], tables[i])
    _exchange_threads(before)


@contextmanager
def _short_spin() -> Iterator[None]:
    """GNU OpenMP, loaded inside, lets an idle thread sleep after some 0.1 ms instead of several ms, in which it would keep a core from
    other processes. A setting of the user's own is left alone."""
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


with _short_spin():  # Numba loads the threading layer with the first parallel function
    run_bands = cached(njit("void(int64, int64, int64)", parallel=True, nogil=True, cache=True), _run)
replay = cached(njit("void(int64[::1], int64[::1], int64[::1], int64)", nogil=True, cache=True), _replay)


def threads() -> int:
    """How many threads share a kernel's bands."""
    return get_num_threads()


def most_threads() -> int:
    """How many may: as many as there are cores for this process, or as NUMBA_NUM_THREADS says."""
    return numba.config.NUMBA_NUM_THREADS


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Inside, what this thread launches and records is shared among so many threads, of 1 ... most_threads()."""
    before = get_num_threads()
    set_num_threads(number)
    try:
        yield
    finally:
        set_num_threads(before)
