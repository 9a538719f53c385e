"""The devices that arrays lie on, and the runtime of the GPU, which registers itself here: nothing below knows what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

DEVICES = ("cpu", "cuda")


class Runtime(Protocol):
    """The holder of arrays on a GPU, which also runs kernels there.

    Its arrays have CuPy's `shape`, `dtype`, `ndim`, `size`, `nbytes`, `itemsize`, `reshape`, len() and slices of the first axis; kernels,
    copies and the methods below do the rest.
    """

    name: str  # of the GPU
    architecture: str  # "sm_90", ...
    multiprocessors: int  # blocks that run side by side

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A new array, without values."""

    def placeholder(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array without memory, for a recording."""

    def subarray(self, buffer: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array that lies in a buffer of bytes, from `offset` on."""

    def allocation(self, array: Any) -> tuple[Any, int]:
        """The owner of an array's memory, and how many bytes into it the array begins."""

    def address(self, array: Any) -> int:
        """Of its first element."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """A copy; waits for the kernels before it."""

    def fetch(self, array: Any) -> Callable[[], np.ndarray]:
        """A function that waits for the kernels launched so far alone, and gives the array's values after them."""

    def from_numpy(self, array: Any, values: np.ndarray) -> None:
        """Copy values of the same dtype and shape into an array."""

    def launch(self, kernel: Any, grid: Any, arguments: Sequence[Any]) -> None:
        """Run a `cuda.kernel.Kernel` after those before it."""

    def multiply(self, product: Any, arguments: Sequence[Any]) -> None:
        """Run a matrix product (`cuda.product.Product`) after the kernels before it."""

    def prepare(self, calls: Sequence[tuple[Any, Any, Sequence[Any]]]) -> Any:
        """Calls (kernel, grid, arguments) as one thing to run: it has run() and timed_run() -> seconds of each call."""

    def synchronize(self) -> None:
        """Wait for all kernels."""


_runtime: Runtime | None = None
_create: Callable[[], Runtime] | None = None


def register_runtime(create: Callable[[], Runtime]) -> None:
    """Name the function that makes the GPU's runtime when it is first needed."""
    global _create
    _create = create


def runtime() -> Runtime:
    """The GPU's runtime. Raises `minivit.errors.DeviceError`, in one line, where this machine has no GPU that minivit can use."""
    global _runtime
    if _runtime is None:
        assert _create is not None, "kernels/__init__.py registers one"
        _runtime = _create()
    return _runtime


@contextmanager
def using(other: Any) -> Iterator[Any]:
    """Inside, the runtime `other`, which it gives, stands for the GPU."""
    global _runtime
    before, _runtime = _runtime, other
    try:
        yield other
    finally:
        _runtime = before


def is_array(value: Any) -> bool:
    """Whether a value is an array that kernels take: NumPy's, or one on a GPU, which speaks CUDA's array protocol."""
    return isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__")


def device_of(array: Any) -> str:
    """The device that an array lies on."""
    return "cpu" if isinstance(array, np.ndarray) else "cuda"


def address_of(array: Any) -> int:
    """Where an array's elements begin."""
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else runtime().address(array)


def allocation_of(array: Any) -> tuple[Any, int]:
    """The owner of an array's memory, and where the array begins, in bytes from a point that all arrays of one owner share."""
    if not isinstance(array, np.ndarray):
        return runtime().allocation(array)
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner, array.ctypes.data
