"""Arrays on the CPU or a GPU: allocation, and copies between the two. The only file that distinguishes NumPy arrays from GPU arrays."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from mmap import mmap
from typing import Any

import numpy as np

from .devices import device_of, is_array, runtime
from .dtypes import BFLOAT16
from .recording import current_recording

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
GPU_ALIGNMENT = 256  # bytes: what cuBLASLt wants of its workspace, and CUDA gives every allocation
# Unused bytes after each array: if two arrays start less than a few vectors apart, a compiled loop over both treats them as overlapping
# and sums in a different order, so results would depend on where the allocator happened to place small arrays.
GUARD = 512


def as_array(values: Any) -> Any:
    """A NumPy array of whatever NumPy can see, tensors and arrays of other libraries on the CPU too; an array on a GPU as it is."""
    return values if is_array(values) else np.asarray(values)


def empty(shape: tuple[int, ...], dtype: Any, device: str = "cpu") -> Any:
    """An uninitialised C-contiguous array; on the CPU its data is aligned to a cache line."""
    dtype = np.dtype(dtype)
    recording = current_recording()
    if device == "cpu":
        size = prod(shape) * dtype.itemsize
        allocated = size + ALIGNMENT + GUARD
        owner = np.empty(allocated, np.uint8) if recording is None else np.frombuffer(mmap(-1, allocated), np.uint8)
        start = -owner.ctypes.data % ALIGNMENT
        array = owner[start : start + size].view(dtype).reshape(shape)
    else:
        array = (runtime().empty if recording is None else runtime().placeholder)(shape, dtype)
    if recording is not None:
        recording.register(array)
    return array


def empty_like(array: Any) -> Any:
    """An uninitialised array with the shape, dtype and device of `array`."""
    return empty(array.shape, array.dtype, device_of(array))


def array_on(device: str, values: np.ndarray) -> Any:
    """A new array on a device, with values copied from the CPU."""
    copy = empty(values.shape, values.dtype, device)
    copy_from_numpy(copy, values)
    return copy


def to_device(array: Any, device: str) -> Any:
    """The array itself if it is on that device, otherwise a copy there."""
    if device_of(array) == device:
        return array
    return to_numpy(array) if device == "cpu" else array_on(device, array)


def constant(values: np.ndarray, device: str) -> Any:
    """Values on a device, copied immediately even while a step is recorded; the recording treats them as an external array."""
    if device == "cpu":
        return values
    copy = runtime().empty(values.shape, values.dtype)
    copy_from_numpy(copy, values)
    return copy


def copy_from_numpy(target: Any, values: np.ndarray) -> None:
    """target[...] = values from the CPU, under NumPy's "same_kind" casting rule; bfloat16, which has no such rule, takes any float."""
    if target.dtype == BFLOAT16 and values.dtype != BFLOAT16:
        values = values.astype(np.float32, casting="same_kind", copy=False)
    casting: Any = "unsafe" if target.dtype == BFLOAT16 else "same_kind"
    if isinstance(target, np.ndarray):
        np.copyto(target, values, casting=casting)
    else:
        broadcast = np.broadcast_to(values.astype(target.dtype, casting=casting, copy=False), target.shape)
        runtime().from_numpy(target, np.ascontiguousarray(broadcast).reshape(target.shape))


def to_numpy(array: Any) -> np.ndarray:
    """An array's values on the CPU; an array already there is returned itself."""
    return array if isinstance(array, np.ndarray) else runtime().to_numpy(array)


def fetch(array: Any) -> Callable[[], np.ndarray]:
    """A function that returns the array's current values on the CPU; it waits for them only, not for kernels launched later."""
    if isinstance(array, np.ndarray):
        copy = array.copy()
        return lambda: copy
    return runtime().fetch(array)


def subarray(buffer: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array view into a buffer of bytes, starting at `offset`."""
    if isinstance(buffer, np.ndarray):
        return np.ndarray(shape, dtype, buffer, offset)
    return runtime().subarray(buffer, offset, shape, dtype)
