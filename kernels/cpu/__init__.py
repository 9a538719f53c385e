"""How a CPU kernel is compiled, cached and run.

    @kernel
    def _scale(band, bands, y, x, factor):              # one of `bands` equal parts of the work, all independent
        for i in range(band * len(x) // bands, (band + 1) * len(x) // bands):
            y[i] = x[i] * factor

    launch(_scale, bands, y, x, 2.0)                    # op.launch: the bands are shared among the threads, as a CUDA grid is

Every kernel is compiled to the one C signature `void(int64 band, int64 *table)`; the table holds the number of bands, then address and
shape of every array and the value of every number. So one small parallel loop, `run_bands`, drives all kernels, a recorded step is an
array of such calls that `replay` executes without Python, and a kernel costs a third of the compile time of its own `prange`.

Kernels are compiled for the argument types they first meet, and cached in the user's cache folder, in a folder named by a hash of all
kernel sources: Numba notices an edited function, but not an edited callee in another file.
"""

from __future__ import annotations

import hashlib
import os
import types as python_types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np import arrayobj

from ..device import BFLOAT16
from ..paths import cache_folder
from .bfloat16 import bfloat16
from .tiles import Tile, TileType

# Reassociation lets sums vectorise. Not nnan or ninf: a NaN must stay visible.
OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}
I32, I64 = ir.IntType(32), ir.IntType(64)
FLOATS = float, np.floating


@cache
def kernel_cache() -> Path:
    """The folder of the compiled kernels of exactly these sources."""
    folder = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return cache_folder() / "kernels" / digest.hexdigest()[:16]


def _cached(compile: Callable, function: Callable) -> Any:
    """`compile(function)` with Numba's cache in our folder, and nobody else's functions there."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(kernel_cache())  # Numba reads it while it decorates
    try:
        return compile(function)
    finally:
        numba.config.CACHE_DIR = before


def routine(function: Callable) -> Callable:
    """A function that kernels call inside their bands; compiled once, and inlined by LLVM where that pays."""
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


# ------------------------------------------------------------------------------------------------------- the table of arguments
class Arguments(types.Type):
    """The address of a table that holds arguments of these Numba types."""

    def __init__(self, members: tuple[types.Type, ...]) -> None:
        self.members = members
        super().__init__(name=f"Arguments({', '.join(map(str, members))})")


@register_model(Arguments)
class _ArgumentsModel(models.PrimitiveModel):
    def __init__(self, manager, type_) -> None:
        super().__init__(manager, type_, I64)


@intrinsic
def _arguments(typing_context, table):
    """The tuple of arguments that a table describes: arrays without an owner, int64 and float64."""

    def generate(context, builder, signature, values):
        address = builder.inttoptr(values[0], I64.as_pointer())
        place = 0

        def following():
            nonlocal place
            place += 1
            return builder.load(builder.gep(address, [ir.Constant(I64, place - 1)]))

        members = []
        for member in table.members:
            if isinstance(member, TileType):
                members.append(context.get_dummy_value())
            elif isinstance(member, types.Array):
                data = builder.inttoptr(following(), context.get_data_type(member.dtype).as_pointer())
                shape = [following() for _ in range(member.ndim)]
                item = context.get_abi_sizeof(context.get_data_type(member.dtype))
                strides = [ir.Constant(I64, item)]
                for length in shape[:0:-1]:
                    strides.insert(0, builder.mul(strides[0], length))
                array = arrayobj.make_array(member)(context, builder)
                arrayobj.populate_array(
                    array,
                    data=data,
                    shape=cgutils.pack_array(builder, shape),
                    itemsize=ir.Constant(I64, item),
                    strides=cgutils.pack_array(builder, strides),
                    meminfo=None,
                )
                members.append(array._getvalue())
            else:
                members.append(builder.bitcast(following(), context.get_value_type(member)))
        return context.make_tuple(builder, signature.return_type, members)

    return types.Tuple(table.members)(table), generate


@cache
def _entry(number: int) -> python_types.CodeType:
    """A function that calls `body`, a global of its, with so many arguments from a table; without a star, so that Numba can inline it."""
    source = f"def entry(band, table):\n    a = _arguments(table)\n    body(band, {', '.join(f'a[{i}]' for i in range(number))})"
    return next(c for c in compile(source, __file__, "exec").co_consts if isinstance(c, python_types.CodeType))


def _member(value: Any) -> types.Type:
    if isinstance(value, np.ndarray):
        return types.Array(bfloat16 if value.dtype == BFLOAT16 else numba.from_dtype(value.dtype), value.ndim, "C")
    if isinstance(value, Tile):
        return TileType(value)
    if not isinstance(value, (*FLOATS, int, np.integer, np.bool_)):
        raise TypeError(f"a kernel takes arrays, numbers and tiles, not {type(value).__name__}")
    return types.float64 if isinstance(value, FLOATS) else types.int64


def address_of(array: np.ndarray) -> int:
    """Where an array's elements begin."""
    return array.__array_interface__["data"][0]


class Kernel:
    """A compiled-when-needed kernel; its function's first arguments are `band, bands`.

    prepares: whether its first array is a function of the other arrays alone: a plan that knows these to stay as they are runs it once.
    """

    def __init__(self, function: Callable, prepares: bool = False) -> None:
        self.function, self.prepares = function, prepares
        self.label, self.__doc__ = function.__name__.strip("_"), function.__doc__
        self.body = njit(inline="always", **OPTIONS)(function)
        self.entries: dict[tuple, Any] = {}  # argument types -> the compiled C function

    def prepare(self, bands: int, arguments: Sequence[Any]) -> tuple[int, np.ndarray]:
        """The address of the compiled entry for these arguments, and their table."""
        key = tuple(
            (a.dtype.char, a.ndim) if isinstance(a, np.ndarray) else a if isinstance(a, Tile) else isinstance(a, FLOATS) for a in arguments
        )
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = self.compile(tuple(map(_member, arguments)))
        table: list[int] = [bands]
        for a in arguments:
            if isinstance(a, np.ndarray):
                if not a.flags.c_contiguous:
                    raise ValueError(f"{self.label} wants C-contiguous arrays, not strides {a.strides} of shape {a.shape}")
                table += address_of(a), *a.shape
            elif not isinstance(a, Tile):
                table.append(int(np.float64(a).view(np.int64)) if isinstance(a, FLOATS) else int(a))
        return entry.address, np.array(table, np.int64)

    def compile(self, members: tuple[types.Type, ...]) -> Any:
        # Numba files a compiled function under its file, name and line: lend the shared entry those of this kernel.
        own = self.function.__code__
        code = _entry(1 + len(members)).replace(co_filename=own.co_filename, co_name=own.co_name, co_firstlineno=own.co_firstlineno)
        entry = python_types.FunctionType(code, globals() | {"body": self.body}, own.co_name)
        entry.__module__ = self.function.__module__
        entry.__qualname__ = self.function.__qualname__
        signature = types.void(types.int64, Arguments((types.int64, *members)))
        return _cached(numba.cfunc(signature, cache=True, **OPTIONS), entry)

    def run(self, bands: int, arguments: Sequence[Any]) -> None:
        """Run all bands now."""
        address, table = self.prepare(bands, arguments)
        run_bands(address, bands, address_of(table))

    def __repr__(self) -> str:
        return f"<kernel {self.function.__module__}.{self.label}>"


def kernel(function: Callable) -> Kernel:
    """Decorator: see the head of this file."""
    return Kernel(function)


def preparation(function: Callable) -> Kernel:
    """Decorator of a kernel whose first array is a function of the other arrays alone, and is all that it writes."""
    return Kernel(function, prepares=True)


# ------------------------------------------------------------------------------------------------------------------------- running
@intrinsic
def call(typing_context, address, band, table):
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
        call(address, 0, table)
    else:
        for band in prange(bands):
            call(address, band, table)


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
    run_bands = _cached(njit("void(int64, int64, int64)", parallel=True, nogil=True, cache=True), _run)
replay = _cached(njit("void(int64[::1], int64[::1], int64[::1], int64)", nogil=True, cache=True), _replay)


class Calls:
    """Calls (kernel, bands, arguments) as three arrays, (bands, entry, table) of each. threads: how many share them."""

    def __init__(self, calls: Sequence[tuple[Kernel, int, Sequence[Any]]], threads: int) -> None:
        self.threads = threads
        prepared = [(bands, *kernel.prepare(bands, arguments)) for kernel, bands, arguments in calls]
        self.bands = np.array([p[0] for p in prepared], np.int64)
        self.entries = np.array([p[1] for p in prepared], np.int64)
        self.tables = np.concatenate([np.zeros(0, np.int64), *(p[2] for p in prepared)])
        lengths = np.cumsum([0] + [len(p[2]) for p in prepared])[: len(prepared)]
        self.addresses = self.tables.ctypes.data + lengths * self.tables.itemsize

    def run(self) -> None:
        replay(self.entries, self.bands, self.addresses, self.threads)

    def timed_run(self) -> list[float]:
        """The seconds that each call took, of which some 0.3 µs are Python's."""
        seconds = []
        with threads_set(self.threads):
            for call in zip(self.entries.tolist(), self.bands.tolist(), self.addresses.tolist()):
                start = perf_counter()
                run_bands(*call)
                seconds.append(perf_counter() - start)
        return seconds


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
