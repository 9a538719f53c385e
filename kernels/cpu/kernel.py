"""CPU kernels: declaration, compilation, cache and execution.

    @kernel
    def _scale(band, bands, y, x, factor):              # band: index of one of `bands` independent parts of the work
        for i in range(band * len(x) // bands, (band + 1) * len(x) // bands):
            y[i] = x[i] * factor

    launch(_scale, bands, y, x, 2.0)                    # core.recording.launch: distributes the bands among the threads

All kernels are compiled to the same C signature `void(int64 band, int64 *table)`; the table holds the number of bands, then the address
and shape of each array and the value of each number. So one parallel loop, `run_bands`, runs all kernels, a recorded step is an array of
such calls that `replay` executes without Python, and a kernel compiles in a third of the time that a `prange` of its own would take.

Kernels are compiled at the first call with each combination of argument types, and cached (`compile.py`). Besides arrays and numbers they
take tiles, and named tuples of numbers, which are stored in the table one number after the other.
"""

from __future__ import annotations

import types as python_types
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from time import perf_counter
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model
from numba.np import arrayobj

from ..core.devices import address_of
from ..core.dtypes import BFLOAT16
from .bfloat16 import bfloat16
from .compile import assembly, cached_entry, compiled_entry, routine
from .copies import side_by_side
from .llvm import I64
from .run import most_threads, replay, run_bands, threads_set
from .team import compiled_loops
from .tiles import Tile, TileType

FLOATS = float, np.floating


# ------------------------------------------------------------------------------------------------------- the table of arguments
class Arguments(types.Type):
    """The Numba type of the address of a table with arguments of these types."""

    def __init__(self, members: tuple[types.Type, ...]) -> None:
        self.members = members
        super().__init__(name=f"Arguments({', '.join(map(str, members))})")


@register_model(Arguments)
class _ArgumentsModel(models.PrimitiveModel):
    def __init__(self, manager, type_) -> None:
        super().__init__(manager, type_, I64)


@intrinsic
def _arguments(typing_context, table):
    """The tuple of arguments stored in a table: arrays that own no memory, int64 and float64, and named tuples of these numbers."""

    def generate(context, builder, signature, values):
        address = builder.inttoptr(values[0], I64.as_pointer())
        position = 0

        def next_word():
            nonlocal position
            position += 1
            return builder.load(builder.gep(address, [ir.Constant(I64, position - 1)]))

        def read(member: types.Type) -> ir.Value:
            if isinstance(member, TileType):
                return context.get_dummy_value()
            if isinstance(member, types.Array):
                return _array(context, builder, member, next_word)
            if isinstance(member, types.BaseTuple):
                return context.make_tuple(builder, member, [read(each) for each in member])
            return builder.bitcast(next_word(), context.get_value_type(member))

        return context.make_tuple(builder, signature.return_type, [read(member) for member in table.members])

    return types.Tuple(table.members)(table), generate


def _array(context: Any, builder: ir.IRBuilder, member: types.Array, next_word: Callable[[], ir.Value]) -> ir.Value:
    """A C-contiguous array, whose address and shape are the next words of the table."""
    data = builder.inttoptr(next_word(), context.get_data_type(member.dtype).as_pointer())
    shape = [next_word() for _ in range(member.ndim)]
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
    return array._getvalue()


@cache
def _entry(number: int) -> python_types.CodeType:
    """Code that calls its global `body` with `number` arguments from a table; without a starred call, so that Numba can inline it."""
    source = f"def entry(band, table):\n    a = _arguments(table)\n    body(band, {', '.join(f'a[{i}]' for i in range(number))})"
    return next(c for c in compile(source, __file__, "exec").co_consts if isinstance(c, python_types.CodeType))


def _key(value: Any) -> Any:
    """The part of an argument that determines how a kernel is compiled."""
    if isinstance(value, np.ndarray):
        return value.dtype.char, value.ndim
    if isinstance(value, tuple):
        return type(value), *map(_key, value)
    return value if isinstance(value, Tile) else isinstance(value, FLOATS)


def _member(value: Any) -> types.Type:
    if isinstance(value, np.ndarray):
        return types.Array(bfloat16 if value.dtype == BFLOAT16 else numba.from_dtype(value.dtype), value.ndim, "C")
    if isinstance(value, Tile):
        return TileType(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return types.BaseTuple.from_types(tuple(map(_number, value)), type(value))
    return _number(value)


def _number(value: Any) -> types.Type:
    if not isinstance(value, (*FLOATS, int, np.integer, np.bool_, Address)):
        raise TypeError(
            f"a kernel takes arrays, numbers, named tuples of numbers, addresses of kernels, and tiles, not {type(value).__name__}"
        )
    return types.float64 if isinstance(value, FLOATS) else types.int64


def _word(value: Any) -> int:
    """A number as stored in the table."""
    if isinstance(value, Address):
        return value.value
    return int(np.float64(value).view(np.int64)) if isinstance(value, FLOATS) else int(value)


class Kernel:
    """A kernel that is compiled when needed; the first arguments of its function are `band, bands`.

    prepares: whether its first array is its only output and depends on the other arrays alone: a plan in which these are constant runs it
    only once.
    """

    def __init__(self, function: Callable, prepares: bool = False) -> None:
        self.function, self.prepares = function, prepares
        self.label, self.__doc__ = function.__name__.strip("_"), function.__doc__
        self.body = routine(function)
        self.entries: dict[tuple, Any] = {}  # argument types -> the compiled C function

    def prepare(self, bands: int, arguments: Sequence[Any]) -> tuple[int, np.ndarray]:
        """The address of the compiled entry point for these arguments, and their table."""
        entry = self.entry(arguments)
        table: list[int] = [bands]
        for a in arguments:
            if isinstance(a, np.ndarray):
                if not a.flags.c_contiguous:
                    raise ValueError(f"{self.label} wants C-contiguous arrays, not strides {a.strides} of shape {a.shape}")
                table += address_of(a), *a.shape
            elif isinstance(a, tuple):
                table += map(_word, a)
            elif not isinstance(a, Tile):
                table.append(_word(a))
        return entry.address, np.array(table, np.int64)

    def assembly(self, arguments: Sequence[Any]) -> str:
        """What is compiled for arguments of these types, in the CPU's assembly language."""
        return assembly(*self._entry_point(arguments))

    def entry(self, arguments: Sequence[Any]) -> Any:
        """The compiled C function for arguments of these types, which is compiled at its first use."""
        key = tuple(map(_key, arguments))
        if key not in self.entries:
            self.entries[key] = compiled_entry(*self._entry_point(arguments))
        return self.entries[key]

    def is_ready(self, arguments: Sequence[Any]) -> bool:
        """Whether `entry` compiles nothing, because this process or the cache has it."""
        key = tuple(map(_key, arguments))
        if key not in self.entries and (entry := cached_entry(*self._entry_point(arguments))):
            self.entries[key] = entry
        return key in self.entries

    def _entry_point(self, arguments: Sequence[Any]) -> tuple[Any, Callable]:
        """(signature, function) of the entry point for arguments of these types."""
        members = tuple(map(_member, arguments))
        # Numba's cache identifies a function by file, name and line: give the shared entry point those of this kernel.
        like = self.function.__code__
        code = _entry(1 + len(members)).replace(co_filename=like.co_filename, co_name=like.co_name, co_firstlineno=like.co_firstlineno)
        entry = python_types.FunctionType(code, globals() | {"body": self.body}, like.co_name)
        entry.__module__ = self.function.__module__
        entry.__qualname__ = self.function.__qualname__
        return types.void(types.int64, Arguments((types.int64, *members))), entry

    def run(self, bands: int, arguments: Sequence[Any]) -> None:
        """Run all bands immediately."""
        address, table = self.prepare(bands, arguments)
        run_bands(address, bands, address_of(table))

    def __repr__(self) -> str:
        return f"<kernel {self.function.__module__}.{self.label}>"


class Address:
    """As an argument of a kernel: where another kernel's code for arguments of these types lies. It is compiled no sooner than needed."""

    def __init__(self, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        self.kernel, self.arguments = kernel, arguments

    @cached_property
    def value(self) -> int:
        return self.kernel.entry(self.arguments).address


def kernel(function: Callable) -> Kernel:
    """Decorator: see the module docstring."""
    return Kernel(function)


def named_kernel(name: str, function: Callable) -> Kernel:
    """A kernel of a function that is made several times with other contents: its compiled code is found again by the name."""
    function.__name__ = function.__qualname__ = name
    return Kernel(function)


def preparation(function: Callable) -> Kernel:
    """Decorator for a kernel whose first array is its only output and depends on the other arrays alone (`Kernel.prepares`)."""
    return Kernel(function, prepares=True)


def compile_missing(calls: Sequence[tuple[Kernel, int, Sequence[Any]]]) -> None:
    """Compile on all cores what these calls need and neither this process nor the cache has."""
    needed = {}
    for kernel, _, arguments in calls:
        inside = [each for group in arguments if isinstance(group, tuple) for each in group if isinstance(each, Address)]
        for needs in (*inside, Address(kernel, tuple(arguments))):
            needed[needs.kernel, tuple(map(_key, needs.arguments))] = needs
    missing: dict[Kernel, list[Address]] = {}
    for needs in needed.values():
        if not needs.kernel.is_ready(needs.arguments):
            missing.setdefault(needs.kernel, []).append(needs)
    # The forms of a kernel are listed in one file of the cache, so one process compiles them all.
    jobs = [partial(_compile, forms) for forms in missing.values()]
    side_by_side([*jobs[:1], compiled_loops, *jobs[1:]], most_threads())


def _compile(forms: Sequence[Address]) -> None:
    for form in forms:
        form.kernel.entry(form.arguments)


class Calls:
    """Calls (kernel, bands, arguments) as three arrays: number of bands, entry and table of each. threads: number of threads to run on."""

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
        """The seconds that each call took, including about 0.3 µs of Python overhead."""
        seconds = []
        with threads_set(self.threads):
            for call in zip(self.entries.tolist(), self.bands.tolist(), self.addresses.tolist()):
                start = perf_counter()
                run_bands(*call)
                seconds.append(perf_counter() - start)
        return seconds
