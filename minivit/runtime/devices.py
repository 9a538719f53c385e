"""User errors for devices that are unavailable or out of memory; arrays of users on either device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import DeviceError, OutOfMemoryError, UserError
from ..kernels import primitives
from ..kernels.core.arrays import copy_from_numpy, to_numpy
from ..kernels.core.devices import DEVICES, device_of, runtime


def check_device(name: str) -> None:
    """Raises UserError if `name` is not a device, or this machine does not have it."""
    if name not in DEVICES:
        raise UserError(f"device={name!r} is not available: choose {' or '.join(map(repr, DEVICES))}")
    if name == "cuda":
        try:
            runtime()
        except DeviceError as error:
            raise UserError(str(error)) from error


@contextmanager
def explain_out_of_memory(images: int) -> Iterator[None]:
    """Convert an out-of-memory error of a step on `images` images into a UserError that says which batch size would fit."""
    try:
        yield
    except OutOfMemoryError as error:
        batch_size = images * error.free // max(error.asked, 1)  # most of a step's memory is proportional to the batch size
        advice = f"a batch of {batch_size} would fit" if batch_size else "the model is too large for it"
        raise UserError(f"a batch of {images} images: {error}; {advice}") from error


def on_cpu(array: Any) -> np.ndarray:
    """A NumPy array as it is, or a copy of any library's array on the GPU, with any strides."""
    return array if isinstance(array, np.ndarray) else to_numpy(primitives("cuda").contiguous(array))


def copy_into(buffer: Any, values: Any) -> None:
    """buffer = values, of the same shape, each on either device; those on the GPU of any library, with any strides. Raises UserError."""
    if device_of(buffer) == device_of(values) == "cuda":
        primitives("cuda").take(buffer, values)
    else:
        copy_from_numpy(buffer, on_cpu(values))
