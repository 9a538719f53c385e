"""The GPU runtime: CuPy arrays, one stream, kernels loaded from cubins, and CUDA graphs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, pairwise
from math import prod
from typing import Any

import numpy as np

from ...errors import DeviceError, OutOfMemoryError, UserError
from .compiled import compile_all, compiled
from .cublaslt import CublasLt
from .kernel import Grid, Kernel
from .product import Product, can_sum

MIN_CAPABILITY = 80  # compute capability 8.0 is the first with bfloat16
DEFAULT_SHARED = 48 * 1024  # bytes of shared memory that a launch may request without setting the attribute below
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SECTION, MOST_AHEAD = 256, 256  # launches that are timed together, and replays before them: two entries a launch of the 1024 of the queue
NO_DEVICE, OLD_DRIVER = 100, 35  # cudaErrorNoDevice, cudaErrorInsufficientDriver


class CupyRuntime:
    """CuPy's current GPU. All work runs in launch order on one stream."""

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(f"device='cuda' needs CuPy, which does not load: install minivit[cuda] ({error})") from None
        self._cupy = cupy
        try:
            if cupy.cuda.runtime.getDeviceCount() == 0:
                raise DeviceError("device='cuda': this machine has no NVIDIA GPU")
            device = cupy.cuda.Device()
            capability = int(device.compute_capability)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                {
                    NO_DEVICE: "device='cuda': this machine has no NVIDIA GPU",
                    OLD_DRIVER: "device='cuda': no NVIDIA driver, or one too old for CUDA 13: 580 or later is needed",
                }.get(error.status, f"device='cuda': {error}")
            ) from None
        if capability < MIN_CAPABILITY:
            raise DeviceError(
                f"device='cuda': this GPU has compute capability {capability / 10}, minivit needs {MIN_CAPABILITY / 10} or later"
            )
        self.name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        self.multiprocessors = device.attributes["MultiProcessorCount"]
        self.architecture = f"sm_{capability}"
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._device, self._pool = device.id, cupy.get_default_memory_pool()
        self._functions: dict[Kernel, Any] = {}
        self._shared: dict[Kernel, int] = {}  # bytes of dynamic shared memory enabled for a kernel
        self._blas: CublasLt | None = None
        self._in_flight: deque[tuple[Any, np.ndarray]] = deque()  # copies: an event after each, and the pinned memory
        self._placeholders = count(1 << 52, 1 << 36)  # addresses without memory

    # ------------------------------------------------------------------------------------------------------------------ arrays
    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        try:
            with self.stream:
                return self._cupy.empty(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError:
            raise OutOfMemoryError(prod(shape) * np.dtype(dtype).itemsize, self.free_bytes()) from None

    def placeholder(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        size = prod(shape) * np.dtype(dtype).itemsize
        memory = self._cupy.cuda.UnownedMemory(next(self._placeholders), max(size, 1), None, self._device)
        return self._cupy.ndarray(shape, dtype, self._cupy.cuda.MemoryPointer(memory, 0))

    def subarray(self, buffer: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return self._cupy.ndarray(shape, dtype, buffer.data + offset)

    def allocation(self, array: Any) -> tuple[Any, int]:
        return array.data.mem, array.data.ptr - array.data.mem.ptr

    def address(self, array: Any) -> int:
        return array.data.ptr

    def to_numpy(self, array: Any) -> np.ndarray:
        return array.get(stream=self.stream)

    def fetch(self, array: Any) -> Callable[[], np.ndarray]:
        values = self._pinned(array.shape, array.dtype)
        array.get(stream=self.stream, out=values, blocking=False)
        event = self._event()
        self._keep(event, values)

        def wait() -> np.ndarray:
            event.synchronize()
            return values

        return wait

    def from_numpy(self, array: Any, values: np.ndarray) -> None:
        staged = self._pinned(values.shape, values.dtype)  # from pageable memory, the copy would wait for earlier kernels
        staged[...] = values
        array.set(staged, stream=self.stream)
        self._keep(self._event(), staged)

    def to_capsule(self, array: Any, **options: Any) -> Any:
        with self.stream:  # for which CuPy makes the consumer's stream wait
            return array.__dlpack__(**options)

    def from_dlpack(self, source: Any) -> Any:
        with self.stream:  # which CuPy passes to the producer, to make it wait
            return self._cupy.ascontiguousarray(self._cupy.from_dlpack(source))

    def accepts(self, array: Any) -> bool:
        return isinstance(array, self._cupy.ndarray) and array.flags.c_contiguous

    @contextmanager
    def borrowed(self, array: Any) -> Iterator[tuple[Any, Sequence[int]]]:
        cupy, known = self._cupy, isinstance(array, self._cupy.ndarray)
        if not known:
            with self.stream:  # which DLPack makes wait for the owner's stream
                array = cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)
        if array.device.id != self._device:
            raise UserError(f"the array lies on GPU {array.device.id}, minivit computes on GPU {self._device}: move it there")
        owner = cupy.cuda.get_current_stream()
        self.stream.wait_event(self._event(owner))
        yield array, array.strides
        if known:
            owner.wait_event(self._event())
        else:  # the owner's stream is not known here
            self.stream.synchronize()

    def _keep(self, event: Any, values: np.ndarray) -> None:
        """Keep the pinned memory of a copy from being used anew before the event after it is done."""
        self._in_flight.append((event, values))
        while len(self._in_flight) > 1 and self._in_flight[0][0].done:
            self._in_flight.popleft()

    def _pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = prod(shape)
        memory = self._cupy.cuda.alloc_pinned_memory(max(size * np.dtype(dtype).itemsize, 1))
        return np.frombuffer(memory, dtype, size).reshape(shape)

    def _event(self, stream: Any = None) -> Any:
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream or self.stream)
        return event

    def free_bytes(self) -> int:
        """Bytes available for new arrays."""
        return self._cupy.cuda.runtime.memGetInfo()[0] + self._pool.free_bytes()

    # ----------------------------------------------------------------------------------------------------------------- running
    def launch(self, kernel: Kernel, grid: Grid, arguments: Sequence[Any]) -> None:
        function = self._functions.get(kernel)
        if function is None:
            function = self._functions[kernel] = self._load(kernel)
        if grid.shared > DEFAULT_SHARED and self._shared.get(kernel, 0) < grid.shared:
            self._cupy.cuda.driver.funcSetAttribute(function.ptr, MAX_DYNAMIC_SHARED, grid.shared)
            self._shared[kernel] = grid.shared
        function((grid.blocks,), (grid.threads,), tuple(map(self._argument, arguments)), grid.shared, self.stream)

    def _load(self, kernel: Kernel) -> Any:
        name, code = compiled(kernel, self.architecture)
        module = self._cupy.cuda.function.Module()
        module.load(code)
        return module.get_function(name)

    def _argument(self, value: Any) -> Any:
        if value is None:
            return np.uint64(0)
        if isinstance(value, self._cupy.ndarray):
            return np.uint64(value.data.ptr)
        return np.float64(value) if isinstance(value, (float, np.floating)) else np.int64(value)

    def multiply(self, product: Product, arguments: Sequence[Any]) -> None:
        self._cublaslt().run(*self._operands(product, arguments))

    def _cublaslt(self) -> CublasLt:
        if self._blas is None:
            self._blas = CublasLt(_library_path(), self)
        return self._blas

    def _operands(self, product: Product, arguments: Sequence[Any]) -> tuple:
        *arrays, workspace = arguments
        addresses = tuple(0 if a is None else a.data.ptr for a in arguments)
        return product, tuple(arrays), addresses, workspace.nbytes, self.stream.ptr

    def capturing(self) -> bool:
        return self.stream.is_capturing()

    def timer(self, run: Callable[[], None], launches: int) -> Callable[[], float]:
        cupy, stream = self._cupy, self.stream
        try:
            graph = _captured(cupy, stream, [run] * launches)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f"a product cannot be captured: {error}") from None
        before, after = cupy.cuda.Event(), cupy.cuda.Event()

        def seconds() -> float:
            before.record(stream)
            graph.launch(stream)
            after.record(stream)
            stream.synchronize()
            return cupy.cuda.get_elapsed_time(before, after) / 1000 / launches

        return seconds

    def sums(self, product: Product, dtype: np.dtype, c_dtype: np.dtype) -> bool:
        return can_sum(product, dtype, c_dtype) and self._cublaslt().fills(product, dtype, c_dtype)

    def prepare(self, calls: Sequence[tuple[Any, Any, Sequence[Any]]]) -> Graph:
        compile_all((kernel for kernel, _, _ in calls if isinstance(kernel, Kernel)), self.architecture)
        for kernel, _, arguments in calls:
            if isinstance(kernel, Kernel):
                if kernel not in self._functions:
                    self._functions[kernel] = self._load(kernel)
            elif isinstance(kernel, Product):  # now, not during the capture of a graph
                self._cublaslt().prepare(*self._operands(kernel, arguments))
        return Graph(self, calls)

    def synchronize(self) -> None:
        self.stream.synchronize()


class Graph:
    """Calls captured into a CUDA graph."""

    def __init__(self, runtime: CupyRuntime, calls: Sequence[tuple[Any, Any, Sequence[Any]]]) -> None:
        self._runtime, self._calls = runtime, calls
        self._graph = self._captured(calls)
        self._busy: Any = None  # a graph of the calls as often as makes many launches
        self._ahead = 1  # its replays before launches that are timed
        self._sections: list[tuple[Any, Sequence[Any], Any]] = []  # (graph of the calls before, some calls, graph of those after)

    def _captured(self, calls: Sequence[tuple[Any, Any, Sequence[Any]]]) -> Any:
        """The CUDA graph of calls; None if there are none."""
        if not calls:
            return None
        return _captured(
            self._runtime._cupy, self._runtime.stream, [partial(kernel.run, grid, arguments) for kernel, grid, arguments in calls]
        )

    def _launch(self, graph: Any) -> None:
        if graph is not None:
            graph.launch(self._runtime.stream)

    def run(self) -> None:
        self._launch(self._graph)

    def timed_run(self) -> list[float]:
        """Seconds of each call on the GPU, launched one by one; the list runs several times.

        A launch costs the host more than a small kernel takes. So the launches queue up behind replays of a graph of the same calls, as
        many as keep the GPU busy until the last launch is queued. The queue is limited, so long lists are timed in sections.
        """
        if self._calls and not self._sections:
            self._busy = self._captured([*self._calls] * -(-SECTION // len(self._calls)))
            ends = [*range(0, len(self._calls), SECTION), len(self._calls)]
            self._sections = [
                (self._captured(self._calls[:start]), self._calls[start:stop], self._captured(self._calls[stop:]))
                for start, stop in pairwise(ends)
            ]
        return [seconds for section in self._sections for seconds in self._timed(*section)]

    def _timed(self, before: Any, calls: Sequence[tuple[Any, Any, Sequence[Any]]], after: Any) -> list[float]:
        cupy, stream = self._runtime._cupy, self._runtime.stream
        events = [cupy.cuda.Event() for _ in range(len(calls) + 1)]
        while True:
            for _ in range(self._ahead):
                self._launch(self._busy)
            self._launch(before)
            events[0].record(stream)
            for event, (kernel, grid, arguments) in zip(events[1:], calls):
                kernel.run(grid, arguments)
                event.record(stream)
            late = events[0].done  # the GPU has waited for the host
            self._launch(after)
            stream.synchronize()
            if not late or self._ahead >= MOST_AHEAD:
                return [cupy.cuda.get_elapsed_time(a, b) / 1000 for a, b in pairwise(events)]
            self._ahead *= 2


def _captured(cupy: Any, stream: Any, launches: Sequence[Callable[[], None]]) -> Any:
    """The CUDA graph of launches on a stream."""
    with stream:
        stream.begin_capture()
        try:
            for launch in launches:
                launch()
        except BaseException:
            with suppress(cupy.cuda.runtime.CUDARuntimeError):  # the error may have ended the capture
                stream.end_capture()
            raise
        return stream.end_capture()


def _library_path() -> str:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        return load_nvidia_dynamic_lib("cublasLt").abs_path
    except Exception as error:  # its class is not documented
        raise DeviceError(f"device='cuda' needs cuBLASLt, which was not found: install minivit[cuda] ({type(error).__name__})") from None
