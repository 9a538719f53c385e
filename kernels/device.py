"""Where arrays live: their allocation on the CPU or a GPU, copies between the two, and the recording of a step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from mmap import mmap
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from . import cuda

DEVICES = ("cpu", "cuda")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ALIGNMENT = 64  # bytes: a cache line, and the widest vector
# Bytes after an array that stay free: where two begin closer together than a few vectors, a compiled loop over both takes them to overlap
# and sums in another order; so results would depend on where the allocator happened to put small arrays.
GUARD = 512


class View(NamedTuple):
    """A part of a buffer that was allocated during the recording, by the buffer's serial number."""

    serial: int
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: Any


class Recording:
    """The kernel calls of one step, in order, and the buffers they use.

    While it is made no kernel runs: memory that `empty` gives out is never touched, and so takes none. (It is mapped for each array by
    itself: the C library's allocator writes between its arrays, on pages that may have 2 MB.) Holds no reference to it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, int, tuple]] = []  # (kernel, bands, arguments)
        self.sizes: list[int] = []  # bytes of each buffer, by serial number
        self.kept: set[int] = set()  # buffers that are read after the step
        self.permanent: set[int] = set()  # buffers that are not written again in each replay
        self.work: Any = None  # what the next calls are part of, if an op has said so (`op.Work`)
        self.works: list[Any] = []  # that, of each call
        self._alive: dict[int, tuple[Callable, int, int]] = {}  # id of a root -> (what gives the root, serial number, where it begins)

    def register(self, array: Any) -> None:
        """Count the buffer that a new array is."""
        root, offset = _root(array)
        # A root on a GPU has no memory, and takes no weak reference.
        self._alive[id(root)] = weakref.ref(root) if isinstance(root, np.ndarray) else lambda: root, len(self.sizes), offset
        self.sizes.append(array.nbytes)

    def describe(self, value: Any) -> Any:
        """A View where `value` lies in a buffer of this step, `value` itself where it is anything else."""
        if not is_array(value):
            return value
        root, offset = _root(value)
        reference, serial, start = self._alive.get(id(root), (None, 0, 0))
        if reference is None or reference() is not root:
            return value
        return View(serial, offset - start, value.shape, value.dtype)

    def add(self, kernel: Any, bands: int, arguments: tuple) -> None:
        self.calls.append((kernel, bands, tuple(map(self.describe, arguments))))
        self.works.append(self.work)

    def keep(self, array: np.ndarray) -> Any:
        """Mark the buffer of `array` as read after the step; returns its description."""
        view = self.describe(array)
        if isinstance(view, View):
            self.kept.add(view.serial)
        return view


def is_array(value: Any) -> bool:
    """Whether a kernel's argument is an array, of either device."""
    return isinstance(value, np.ndarray) or (hasattr(value, "dtype") and hasattr(value, "reshape") and not isinstance(value, np.generic))


def place_of(array: Any) -> str:
    """The device that an array lies on."""
    return "cpu" if isinstance(array, np.ndarray) else "cuda"


def _root(array: Any) -> tuple[Any, int]:
    """What owns an array's memory, and where the array begins, in bytes from a point that all arrays of one owner share."""
    if not isinstance(array, np.ndarray):
        return cuda.runtime().root(array)
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return root, array.ctypes.data


_thread = threading.local()  # .recording: what launch() and empty() report to, in the thread that records


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


def is_floating(dtype: np.dtype) -> bool:
    """Whether numbers of this dtype carry gradients."""
    return dtype.kind == "f" or dtype == BFLOAT16


def common(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The dtype of what an op makes of floating inputs of these: bfloat16 where any of them is, else that of the first."""
    return BFLOAT16 if BFLOAT16 in dtypes else dtypes[0]


def assign(to: Any, values: np.ndarray) -> None:
    """to[...] = values of the CPU, where NumPy's rule of "same_kind" allows it for float32 and float64; for bfloat16 it has no rule."""
    if to.dtype == BFLOAT16 and values.dtype != BFLOAT16:
        values = values.astype(np.float32, casting="same_kind", copy=False)
    casting: Any = "unsafe" if to.dtype == BFLOAT16 else "same_kind"
    if isinstance(to, np.ndarray):
        np.copyto(to, values, casting=casting)
    else:
        whole = np.broadcast_to(values.astype(to.dtype, casting=casting, copy=False), to.shape)
        cuda.runtime().from_host(to, np.ascontiguousarray(whole).reshape(to.shape))


def to_host(array: Any) -> np.ndarray:
    """An array's values on the CPU: of one that is there, itself."""
    return array if isinstance(array, np.ndarray) else cuda.runtime().to_host(array)


def fetch(array: Any) -> Callable[[], np.ndarray]:
    """What gives an array's values of now, on the CPU: of one on a GPU it waits for these, while kernels launched later go on."""
    if isinstance(array, np.ndarray):
        copy = array.copy()
        return lambda: copy
    return cuda.runtime().fetch(array)


def moved(array: Any, place: str) -> Any:
    """The array itself where it lies on that device, else a copy there."""
    if place_of(array) == place:
        return array
    return to_host(array) if place == "cpu" else copied(array, place)


def copied(values: np.ndarray, place: str) -> Any:
    """A new array on a device with these values of the CPU."""
    copy = empty(values.shape, values.dtype, place)
    assign(copy, values)
    return copy


def constant(array: np.ndarray, place: str) -> Any:
    """Values on a device, made at once even while a step is recorded, for whose kernels they are an array from outside."""
    if place == "cpu":
        return array
    copy = cuda.runtime().empty(array.shape, array.dtype)
    assign(copy, array)
    return copy


def accumulator(dtype: np.dtype) -> np.dtype:
    """The dtype of sums and statistics of numbers of this one."""
    return np.dtype(np.float32) if dtype == BFLOAT16 else dtype


def empty(shape: tuple[int, ...], dtype: Any, place: str = "cpu") -> Any:
    """An uninitialised C-contiguous array; on the CPU its data starts on a cache line."""
    dtype = np.dtype(dtype)
    recording = current_recording()
    if place == "cpu":
        size = prod(shape) * dtype.itemsize
        room = size + ALIGNMENT + GUARD
        root = np.empty(room, np.uint8) if recording is None else np.frombuffer(mmap(-1, room), np.uint8)
        start = -root.ctypes.data % ALIGNMENT
        array = root[start : start + size].view(dtype).reshape(shape)
    else:
        array = (cuda.runtime().empty if recording is None else cuda.runtime().phantom)(shape, dtype)
    if recording is not None:
        recording.register(array)
    return array


def like(array: Any) -> Any:
    """An uninitialised array of the shape and dtype of `array`, on its device."""
    return empty(array.shape, array.dtype, place_of(array))


def part(buffer: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array that lies in a buffer of bytes, from `offset` on."""
    if isinstance(buffer, np.ndarray):
        return np.ndarray(shape, dtype, buffer, offset)
    return cuda.runtime().part(buffer, offset, shape, dtype)


def address_of(array: Any) -> int:
    """Where an array's elements begin."""
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else cuda.runtime().address(array)
