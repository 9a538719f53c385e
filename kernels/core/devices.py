"""The devices that hold arrays, and the GPU runtime, which is registered here so that this package does not depend on its library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

DEVICES = ("cpu", "cuda")


class Runtime(Protocol):
    """Owns the arrays on a GPU and runs kernels there.

    Its arrays support CuPy's `shape`, `dtype`, `ndim`, `size`, `nbytes`, `itemsize`, `reshape`, len() and slices of the first axis; all
    other work is done by kernels, copies and the methods below.
    """

    name: str  # of the GPU
    architecture: str  # "sm_90", ...
    multiprocessors: int  # number of streaming multiprocessors (SMs)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A new uninitialised array."""

    def placeholder(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array without memory, for a recording."""

    def subarray(self, buffer: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """An array view into a buffer of bytes, starting at `offset`."""

    def allocation(self, array: Any) -> tuple[Any, int]:
        """The owner of an array's memory, and the array's offset in it in bytes."""

    def address(self, array: Any) -> int:
        """The address of the array's first element."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """A copy on the CPU; waits for the kernels launched before."""

    def fetch(self, array: Any) -> Callable[[], np.ndarray]:
        """A function that waits only for the kernels launched so far, and returns the array's values after them."""

    def from_numpy(self, array: Any, values: np.ndarray) -> None:
        """Copy values of the same dtype and shape into an array."""

    def to_capsule(self, array: Any, **options: Any) -> Any:
        """`__dlpack__` of an array, for a consumer that waits for the kernels launched before."""

    def from_dlpack(self, source: Any) -> Any:
        """An array here that shares the memory of one of another library, or a copy if that is not C-contiguous.

        Kernels that are launched later wait for what was done to it.
        """

    def accepts(self, array: Any) -> bool:
        """Whether kernels can take an array on a GPU as it lies: one of this runtime's kind that is C-contiguous."""

    def borrowed(self, array: Any) -> AbstractContextManager[tuple[Any, Sequence[int]]]:
        """Context manager: any library's array on this GPU as one of this runtime's kind, with any strides, and these strides in bytes.

        Kernels launched inside run after the work that the array's owner has launched, and before what it launches afterwards.
        Raises UserError for an array on another GPU.
        """

    def launch(self, kernel: Any, grid: Any, arguments: Sequence[Any]) -> None:
        """Run a `cuda.kernel.Kernel` after the kernels launched before."""

    def multiply(self, product: Any, arguments: Sequence[Any]) -> None:
        """Run a matrix product (`cuda.product.Product`) after the kernels launched before."""

    def sums(self, product: Any, dtype: np.dtype, c_dtype: np.dtype) -> bool:
        """Whether a product of matrices of `dtype` can be computed with its sums (`Product.sums`), and fills the GPU as without them."""

    def prepare(self, calls: Sequence[tuple[Any, Any, Sequence[Any]]]) -> Any:
        """Calls (kernel, grid, arguments) as one object: run(), and timed_run(), which may run them repeatedly, for the seconds of each."""

    def synchronize(self) -> None:
        """Wait for all kernels."""


_runtime: Runtime | None = None
_create: Callable[[], Runtime] | None = None


def register_runtime(create: Callable[[], Runtime]) -> None:
    """Register the function that creates the GPU runtime when it is first needed."""
    global _create
    _create = create


def runtime() -> Runtime:
    """The GPU runtime. Raises `minivit.errors.DeviceError`, with a one-line message, if this machine has no usable GPU."""
    global _runtime
    if _runtime is None:
        assert _create is not None, "kernels/__init__.py registers one"
        _runtime = _create()
    return _runtime


@contextmanager
def using(other: Any) -> Iterator[Any]:
    """Context manager: the runtime `other`, which it yields, replaces the GPU's."""
    global _runtime
    previous, _runtime = _runtime, other
    try:
        yield other
    finally:
        _runtime = previous


def is_array(value: Any) -> bool:
    """Whether a value is an array that kernels take: NumPy's, or one on a GPU, which speaks CUDA's array protocol."""
    return isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__")


def device_of(array: Any) -> str:
    """The device that holds an array."""
    return "cpu" if isinstance(array, np.ndarray) else "cuda"


def address_of(array: Any) -> int:
    """The address of an array's first element."""
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else runtime().address(array)


def allocation_of(array: Any) -> tuple[Any, int]:
    """The owner of an array's memory, and the array's position in bytes, relative to an origin common to all arrays of that owner."""
    if not isinstance(array, np.ndarray):
        return runtime().allocation(array)
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner, array.ctypes.data
