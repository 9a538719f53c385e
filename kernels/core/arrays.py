"""Arrays on the CPU or a GPU: their allocation, and copies between the two. The one file that knows NumPy's arrays from the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from mmap import mmap
from typing import Any

import numpy as np

from .devices import device_of, is_array, runtime
from .dtypes import BFLOAT16
from .recording import current_recording

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
# Bytes after an array that stay free: where two begin closer together than a few vectors, a compiled loop over both takes them to overlap
# and sums in another order; so results would depend on where the allocator happened to put small arrays.
GUARD = 512


def as_array(values: Any) -> Any:
    """A NumPy array of whatever NumPy can see, tensors and arrays of other libraries on the CPU too; an array on a GPU as it is."""
    return values if is_array(values) else np.asarray(values)


def empty(shape: tuple[int, ...], dtype: Any, device: str = "cpu") -> Any:
    """An uninitialised C-contiguous array; on the CPU its data starts on a cache line."""
    dtype = np.dtype(dtype)
    recording = current_recording()
    if device == "cpu":
        size = prod(shape) * dtype.itemsize
        room = size + ALIGNMENT + GUARD
        owner = np.empty(room, np.uint8) if recording is None else np.frombuffer(mmap(-1, room), np.uint8)
        start = -owner.ctypes.data % ALIGNMENT
        array = owner[start : start + size].view(dtype).reshape(shape)
    else:
        array = (runtime().empty if recording is None else runtime().placeholder)(shape, dtype)
    if recording is not None:
        recording.register(array)
    return array


def empty_like(array: Any) -> Any:
    """An uninitialised array of the shape and dtype of `array`, on its device."""
    return empty(array.shape, array.dtype, device_of(array))


def array_on(device: str, values: np.ndarray) -> Any:
    """A new array on a device with these values of the CPU."""
    copy = empty(values.shape, values.dtype, device)
    copy_from_numpy(copy, values)
    return copy


def to_device(array: Any, device: str) -> Any:
    """The array itself where it lies on that device, else a copy there."""
    if device_of(array) == device:
        return array
    return to_numpy(array) if device == "cpu" else array_on(device, array)


def constant(values: np.ndarray, device: str) -> Any:
    """Values on a device, copied at once even while a step is recorded, for whose kernels they are an array from outside."""
    if device == "cpu":
        return values
    copy = runtime().empty(values.shape, values.dtype)
    copy_from_numpy(copy, values)
    return copy


def copy_from_numpy(to: Any, values: np.ndarray) -> None:
    """to[...] = values of the CPU, where NumPy's rule of "same_kind" allows it for float32 and float64; for bfloat16 it has no rule."""
    if to.dtype == BFLOAT16 and values.dtype != BFLOAT16:
        values = values.astype(np.float32, casting="same_kind", copy=False)
    casting: Any = "unsafe" if to.dtype == BFLOAT16 else "same_kind"
    if isinstance(to, np.ndarray):
        np.copyto(to, values, casting=casting)
    else:
        whole = np.broadcast_to(values.astype(to.dtype, casting=casting, copy=False), to.shape)
        runtime().from_numpy(to, np.ascontiguousarray(whole).reshape(to.shape))


def to_numpy(array: Any) -> np.ndarray:
    """An array's values on the CPU: an array that lies there, itself."""
    return array if isinstance(array, np.ndarray) else runtime().to_numpy(array)


def fetch(array: Any) -> Callable[[], np.ndarray]:
    """A function that gives the array's present values on the CPU: it waits for these alone, while kernels launched later go on."""
    if isinstance(array, np.ndarray):
        copy = array.copy()
        return lambda: copy
    return runtime().fetch(array)


def subarray(buffer: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array that lies in a buffer of bytes, from `offset` on."""
    if isinstance(buffer, np.ndarray):
        return np.ndarray(shape, dtype, buffer, offset)
    return runtime().subarray(buffer, offset, shape, dtype)
