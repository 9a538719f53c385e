"""Recording a step of training or a forward: which kernels run, on which buffers.

All launches go through `launch`, which runs or records a kernel, or through `launch_late`, which records several as one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .devices import allocation_of, is_array


class View(NamedTuple):
    """A view into a buffer that was allocated during the recording."""

    serial: int  # number of the buffer
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


Join = Callable[[list[tuple]], None]  # launches what is done for several items, of arrays and numbers, in one or few kernels


class Late(NamedTuple):
    """What waits to be launched together with others of its kind."""

    join: Join
    item: tuple  # its arrays described
    written: list[tuple[Any, int, int]]  # the memory of its outputs: serial number or owner, first and last byte
    op_call: Any


class Recording:
    """The kernel calls of one step, in order, and the buffers they use.

    No kernel runs during the recording, so memory returned by `arrays.empty` is never touched and occupies no physical pages. (Each array
    is mapped separately: the C library's allocator writes its headers between arrays, and a page may have 2 MB.) The recording holds no
    reference to the arrays.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, tuple]] = []  # (kernel, bands or grid, arguments)
        self.sizes: list[int] = []  # bytes of each buffer, by serial number
        self.kept: set[int] = set()  # buffers that are read after the step
        self.permanent: set[int] = set()  # buffers that a replay does not write again
        self.op_call: Any = None  # the call of an op to which the next launches belong (`op.OpCall`), if any
        self.op_calls: list[Any] = []  # the op_call of each launch
        self._late: list[Late] = []
        self._alive: dict[int, tuple[Callable, int, int]] = {}  # id of an owner -> (reference to it, serial number, its start)

    def register(self, array: Any) -> None:
        """Assign the next serial number to the buffer of a new array."""
        owner, offset = allocation_of(array)
        # The owner of a GPU placeholder has no memory and does not support weak references.
        reference = weakref.ref(owner) if isinstance(owner, np.ndarray) else lambda: owner
        self._alive[id(owner)] = reference, len(self.sizes), offset
        self.sizes.append(array.nbytes)

    def describe(self, value: Any) -> Any:
        """A View if `value` is an array in a buffer of this step, otherwise `value` itself."""
        if not is_array(value):
            return value
        owner, offset = allocation_of(value)
        reference, serial, start = self._alive.get(id(owner), (None, 0, 0))
        if reference is None or reference() is not owner:
            return value
        return View(serial, offset - start, value.shape, value.dtype)

    def add(self, kernel: Any, grid: Any, arguments: tuple) -> None:
        """Record a launch, after those that wait if it has an array that one of them writes."""
        described = tuple(map(self.describe, arguments))
        if self._late and any(_overlap(a, b) for a in _memory(described) for late in self._late for b in late.written):
            self.launch_waiting()
        self.calls.append((kernel, grid, described))
        self.op_calls.append(self.op_call)

    def add_late(self, join: Join, item: tuple, outputs: int) -> None:
        """Record `join` of an item, together with others, before its outputs are used; see `launch_late`."""
        described = tuple(map(self.describe, item))
        self._late.append(Late(join, described, _memory(described[:outputs]), self.op_call))

    def launch_waiting(self) -> None:
        """Record what waits, of each kind together."""
        waiting, self._late, current = self._late, [], self.op_call
        for join in dict.fromkeys(late.join for late in waiting):
            some = [late for late in waiting if late.join is join]
            self.op_call = some[0].op_call
            join([late.item for late in some])
        self.op_call = current

    def keep(self, array: Any) -> Any:
        """Mark the buffer of `array` as read after the step; returns its description."""
        view = self.describe(array)
        if isinstance(view, View):
            self.kept.add(view.serial)
        return view


def _memory(values: Iterable[Any]) -> list[tuple[Any, int, int]]:
    """Of the arrays among described values: which memory, and the first byte and the one after the last."""
    found: list[tuple[Any, int, int]] = []
    for value in values:
        if isinstance(value, View):
            found.append((("buffer", value.serial), value.offset, value.offset + value.nbytes))
        elif is_array(value):
            owner, offset = allocation_of(value)
            found.append((id(owner), offset, offset + value.nbytes))
    return found


def _overlap(a: tuple[Any, int, int], b: tuple[Any, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


_thread = threading.local()  # .recording: the recording that launch() and empty() of this thread add to


def current_recording() -> Recording | None:
    """The recording in progress in this thread, if any."""
    return getattr(_thread, "recording", None)


@contextmanager
def record() -> Iterator[Recording]:
    """Context manager: allocations and launches are recorded, and no kernel runs."""
    if current_recording() is not None:
        raise RuntimeError("a step is being recorded already")
    _thread.recording = Recording()
    try:
        yield _thread.recording
        _thread.recording.launch_waiting()
    finally:
        _thread.recording = None


def launch(kernel: Any, grid: Any, *arguments: Any) -> None:
    """Run a kernel, or only add it to this thread's recording.

    kernel, grid: a `cpu.kernel.Kernel` and its number of bands, or a `cuda.kernel.Kernel` and its `Grid`.
    """
    recording = current_recording()
    if recording is None:
        kernel.run(grid, arguments)
    else:
        recording.add(kernel, grid, arguments)


def launch_late(join: Join, *item: Any, outputs: int) -> None:
    """Run join([item]), or record it: with the other items of the same `join`, before a launch that is given an array that one writes.

    item: arrays and numbers; the first ones are its outputs, so many, and nothing else is written. Nobody changes its other arrays.
    """
    recording = current_recording()
    if recording is None:
        join([item])
    else:
        recording.add_late(join, item, outputs)
