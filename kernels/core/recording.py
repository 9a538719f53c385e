"""Recording a step of training or a forward: which kernels run, on which buffers.

All launches go through `launch`, which runs or records a kernel.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .devices import allocation_of, is_array


class View(NamedTuple):
    """A view into a buffer that was allocated during the recording."""

    serial: int  # number of the buffer
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: Any


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
        """Record a launch."""
        self.calls.append((kernel, grid, tuple(map(self.describe, arguments))))
        self.op_calls.append(self.op_call)

    def keep(self, array: Any) -> Any:
        """Mark the buffer of `array` as read after the step; returns its description."""
        view = self.describe(array)
        if isinstance(view, View):
            self.kept.add(view.serial)
        return view


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
