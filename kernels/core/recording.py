"""The recording of a step: which kernels run, on which buffers. Every launch passes one gate, `launch`, that runs a kernel or notes it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .devices import allocation_of, is_array


class View(NamedTuple):
    """A part of a buffer that was allocated during the recording, by the buffer's serial number."""

    serial: int
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: Any


class Recording:
    """The kernel calls of one step, in order, and the buffers they use.

    While it is made no kernel runs: memory that `arrays.empty` gives out is never touched, and so takes none. (It is mapped for each array
    by itself: the C library's allocator writes between its arrays, on pages that may have 2 MB.) The recording holds no reference to it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, tuple]] = []  # (kernel, bands or grid, arguments)
        self.sizes: list[int] = []  # bytes of each buffer, by serial number
        self.kept: set[int] = set()  # buffers that are read after the step
        self.permanent: set[int] = set()  # buffers that are not written again in each replay
        self.op_call: Any = None  # the call of an op that the next launches belong to, if an op has said so (`op.OpCall`)
        self.op_calls: list[Any] = []  # that of each launch
        self._alive: dict[int, tuple[Callable, int, int]] = {}  # id of an owner -> (function that gives it, serial number, its beginning)

    def register(self, array: Any) -> None:
        """Count the buffer that a new array is."""
        owner, offset = allocation_of(array)
        # An owner on a GPU has no memory, and takes no weak reference.
        reference = weakref.ref(owner) if isinstance(owner, np.ndarray) else lambda: owner
        self._alive[id(owner)] = reference, len(self.sizes), offset
        self.sizes.append(array.nbytes)

    def describe(self, value: Any) -> Any:
        """A View where `value` lies in a buffer of this step, `value` itself where it is anything else."""
        if not is_array(value):
            return value
        owner, offset = allocation_of(value)
        reference, serial, start = self._alive.get(id(owner), (None, 0, 0))
        if reference is None or reference() is not owner:
            return value
        return View(serial, offset - start, value.shape, value.dtype)

    def add(self, kernel: Any, grid: Any, arguments: tuple) -> None:
        """Note a launch."""
        self.calls.append((kernel, grid, tuple(map(self.describe, arguments))))
        self.op_calls.append(self.op_call)

    def keep(self, array: Any) -> Any:
        """Mark the buffer of `array` as read after the step; returns its description."""
        view = self.describe(array)
        if isinstance(view, View):
            self.kept.add(view.serial)
        return view


_thread = threading.local()  # .recording: where launch() and empty() report to, in the thread that records


def current_recording() -> Recording | None:
    """The recording that this thread makes, if any."""
    return getattr(_thread, "recording", None)


@contextmanager
def record() -> Iterator[Recording]:
    """Inside, everything that is allocated and launched is recorded, and nothing runs."""
    if current_recording() is not None:
        raise RuntimeError("a step is being recorded already")
    _thread.recording = Recording()
    try:
        yield _thread.recording
    finally:
        _thread.recording = None


def launch(kernel: Any, grid: Any, *arguments: Any) -> None:
    """Run a kernel, or only note it in this thread's recording.

    kernel, grid: a `cpu.kernel.Kernel` and the number of its independent parts, or a `cuda.kernel.Kernel` and its `Grid`.
    """
    recording = current_recording()
    if recording is None:
        kernel.run(grid, arguments)
    else:
        recording.add(kernel, grid, arguments)
