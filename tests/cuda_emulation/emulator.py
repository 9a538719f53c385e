"""Runs the CUDA kernels on a CPU: a Runtime whose arrays lie in NumPy's memory, and that builds the sources with g++.

An array here is no NumPy array, and knows only what `kernels.core.devices.Runtime` promises: code that does more with an array on a GPU
fails.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from minivit.kernels.core import dlpack
from minivit.kernels.core.cache import cache_folder
from minivit.kernels.core.strides import strides
from minivit.kernels.cuda import kernel as cuda
from minivit.kernels.cuda.cublaslt import CublasLt
from minivit.kernels.cuda.product import Product, can_sum

HERE = Path(__file__).resolve().parent
SHARED_LIMIT, THREAD_LIMIT = 227 * 1024, 1024  # of a block, on compute capability 9.0
PHANTOMS = 1 << 52  # the address of what has no memory
TOGETHER = 24  # kernels that one call of the compiler builds
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-strict-aliasing")


def unavailable() -> str:
    """Why kernels cannot be emulated here, or ""."""
    return "" if shutil.which("g++") else "no g++ to build the CUDA kernels for the CPU"


class Memory:
    """What owns the bytes of arrays; a phantom has none."""

    def __init__(self, size: int, phantom: bool = False) -> None:
        self.size = size
        self.bytes = None if phantom else np.full(size, 0xFF, np.uint8)

    @property
    def address(self) -> int:
        return PHANTOMS if self.bytes is None else self.bytes.ctypes.data


class Array:
    def __init__(self, memory: Memory, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.memory, self.offset, self.shape, self.dtype = memory, offset, tuple(shape), np.dtype(dtype)
        assert offset + self.nbytes <= memory.size

    __cuda_array_interface__ = property(lambda self: {"shape": self.shape, "typestr": self.dtype.str, "version": 3})
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape, dtype=np.int64)))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape) -> Array:
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        return Array(self.memory, self.offset, np.broadcast_to(np.uint8(0), self.size).reshape(shape).shape, self.dtype)

    def __getitem__(self, key) -> Array:
        step = self.nbytes // len(self)
        if isinstance(key, slice):
            start, stop, stride = key.indices(len(self))
            assert stride == 1
            return Array(self.memory, self.offset + start * step, (max(0, stop - start), *self.shape[1:]), self.dtype)
        return Array(self.memory, self.offset + range(len(self))[key] * step, self.shape[1:], self.dtype)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(self, **options):
        capsule = self.host().__dlpack__(**options)
        dlpack.described(capsule).device_type = dlpack.CUDA
        return capsule

    def host(self) -> np.ndarray:
        """The elements themselves."""
        if self.memory.bytes is None:
            raise RuntimeError("an array of a recording holds no values")
        return self.memory.bytes[self.offset : self.offset + self.nbytes].view(self.dtype).reshape(self.shape)


class OnCpu:
    """An array of the emulated GPU, for NumPy, which takes none of a GPU."""

    def __init__(self, source) -> None:
        self.source = source

    def __dlpack__(self, **options):
        capsule = self.source.__dlpack__(**options)
        dlpack.described(capsule).device_type = dlpack.ON_CPU[0]
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.ON_CPU[0], 0


class Borrowed(Array):
    """An array of another library: it has its first element's address, and any strides."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.memory, self.offset, self.shape, self.dtype = SimpleNamespace(address=address, bytes=None), 0, shape, dtype


class Emulator:
    """seed: of the order in which threads run. sanitize: build with AddressSanitizer, which must be loaded with the process.

    choose: whether algorithms of products are timed, by the clock of the emulated cuBLASLt, and kept; otherwise its first one runs.
    """

    name, architecture = "emulated GPU", "sm_90"
    multiprocessors = 3  # so that no test's grid has a block for every row

    def __init__(self, seed: int = 0, sanitize: bool = False, choose: bool = False) -> None:
        self.seed, self.sanitize, self.choose = seed, sanitize, choose
        self.used: set[cuda.Kernel] = set()
        self.in_capture = False
        self._blas: CublasLt | None = None

    # ------------------------------------------------------------------------------------------------------------------ arrays
    def empty(self, shape, dtype):
        return Array(Memory(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize), 0, shape, dtype)

    def placeholder(self, shape, dtype):
        return Array(Memory(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, phantom=True), 0, shape, dtype)

    def subarray(self, buffer, offset, shape, dtype):
        return Array(buffer.memory, buffer.offset + offset, shape, dtype)

    def allocation(self, array):
        return array.memory, array.offset

    def address(self, array):
        return array.memory.address + array.offset

    def accepts(self, array):
        return isinstance(array, Array)

    @contextmanager
    def borrowed(self, array):
        interface = array.__cuda_array_interface__
        shape, (address, _) = tuple(interface["shape"]), interface.get("data", (0, False))
        dtype = np.dtype(array.dtype)
        steps = interface.get("strides") or tuple(dtype.itemsize * n for n in strides(shape))
        yield (array if isinstance(array, Array) else Borrowed(address, shape, dtype)), steps

    def to_numpy(self, array):
        return array.host().copy()

    def fetch(self, array):
        values = self.to_numpy(array)
        return lambda: values

    def from_numpy(self, array, values):
        assert isinstance(values, np.ndarray) and values.dtype == array.dtype and values.shape == array.shape
        array.host()[...] = values

    def to_capsule(self, array, **options):
        return array.__dlpack__(**options)

    def from_dlpack(self, source):
        values, memory = np.from_dlpack(OnCpu(source)), Memory(0)
        memory.bytes = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        memory.size = memory.bytes.size
        return Array(memory, 0, values.shape, values.dtype)

    # ----------------------------------------------------------------------------------------------------------------- running
    def launch(self, kernel, grid, arguments):
        assert 0 < grid.threads <= THREAD_LIMIT and grid.shared <= SHARED_LIMIT and grid.blocks > 0, grid
        self.used.add(kernel)
        values = [_value(self, a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        status = entry(kernel, self.sanitize)(pointers, len(values), grid.blocks, grid.threads, grid.shared, self.seed)
        if status < 0:
            raise TypeError(f"{kernel.expression} takes {-status - 1} arguments, not {len(values)}")
        if status:
            raise RuntimeError(f"{kernel.expression}: {ctypes.c_char_p.in_dll(scheduler(self.sanitize), 'emulated_reason').value.decode()}")

    def multiply(self, product: Product, arguments):
        self.cublaslt().run(*self._operands(product, arguments))

    def cublaslt(self) -> CublasLt:
        if self._blas is None:
            self._blas = CublasLt(str(cublaslt_path()), self)
        return self._blas

    def _operands(self, product: Product, arguments):
        if not self.choose and product.rank is None:
            product = product._replace(rank=0)
        assert all(m is None or m.memory.bytes is not None for m in arguments), "an array of a recording holds no values"
        addresses = tuple(0 if m is None else self.address(m) for m in arguments)
        return product, tuple(arguments[:5]), addresses, arguments[5].nbytes, 0

    def capturing(self):
        return self.in_capture

    def timer(self, run, launches):
        clock = ctypes.CDLL(str(cublaslt_path())).emulated_clock
        clock.restype = ctypes.c_double

        def seconds() -> float:
            before = clock()
            run()  # once is enough: it takes as long every time
            return clock() - before

        return seconds

    def sums(self, product, dtype, c_dtype):
        return can_sum(product, dtype, c_dtype) and self.cublaslt().fills(product, dtype, c_dtype)

    def prepare(self, calls):
        kernels = {kernel for kernel, _, _ in calls if isinstance(kernel, cuda.Kernel)}
        build({kernel for kernel in kernels if (kernel, self.sanitize) not in _built}, self.sanitize)
        for kernel, _, arguments in calls:
            if isinstance(kernel, Product):
                self.cublaslt().prepare(*self._operands(kernel, arguments))
        return Calls(self, list(calls))

    def synchronize(self):
        pass


class Calls:
    def __init__(self, runtime, calls):
        self.runtime, self.calls = runtime, calls

    def run(self):
        for kernel, grid, arguments in self.calls:
            kernel.run(grid, arguments)

    def timed_run(self):
        self.run()
        return [1e-6] * len(self.calls)


def _value(emulator, argument):
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, Array):
        return ctypes.c_void_p(emulator.address(argument))
    if isinstance(argument, (bool, int, np.integer, np.bool_)):
        return ctypes.c_int64(int(argument))
    if isinstance(argument, (float, np.floating)):
        return ctypes.c_double(float(argument))
    raise TypeError(f"a kernel takes arrays on the GPU and numbers, not {type(argument).__name__}")


# ---------------------------------------------------------------------------------------------------------------------- building
@cache
def _digest() -> str:
    """Of the headers, and the tools that build them."""
    digest = hashlib.sha256(subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout)
    for path in sorted([*cuda.FOLDER.rglob("*.cuh"), *HERE.glob("*.cuh"), *HERE.glob("*.hpp")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _build(text: str, *flags: str) -> Path:
    """The shared library of a C++ source, built once."""
    name = hashlib.sha256((_digest() + text + " ".join(flags)).encode()).hexdigest()[:24]
    library = cache_folder() / "emulation" / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, made = Path(folder) / "kernel.cpp", Path(folder) / library.name
            source.write_text(text)
            done = subprocess.run(
                ["g++", *FLAGS, *flags, f"-I{HERE}", f"-I{cuda.FOLDER / 'cuda'}", f"-I{cuda.FOLDER}", "-o", made, source],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"g++ does not build {text.splitlines()[0]}:\n{done.stderr[:4000]}")
            made.replace(library)
    return library


@contextmanager
def alone() -> Iterator[None]:
    """Inside, no other process is."""
    folder = cache_folder() / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _flags(sanitize: bool) -> tuple[str, ...]:
    return ("-fsanitize=address", "-g1") if sanitize else ()  # with the lines where it happened


@cache
def scheduler(sanitize: bool) -> ctypes.CDLL:
    # Not itself sanitized: it moves between stacks.
    return ctypes.CDLL(str(_build((HERE / "scheduler.cpp").read_text())), mode=ctypes.RTLD_GLOBAL)


@cache
def cublaslt_path() -> Path:
    """The emulated cuBLASLt."""
    return _build((HERE / "cublaslt.cpp").read_text(), "-O3")


_built: dict[tuple[cuda.Kernel, bool], tuple[Path, str]] = {}  # the library of a kernel, and its function in it


def entry(kernel: cuda.Kernel, sanitize: bool = False):
    """The C function that runs a kernel."""
    if (kernel, sanitize) not in _built:
        build([kernel], sanitize)
    library, name = _built[kernel, sanitize]
    return _function(library, name, sanitize)


@cache
def _function(library: Path, name: str, sanitize: bool):
    scheduler(sanitize)
    function = getattr(ctypes.CDLL(str(library)), name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_int, *(ctypes.c_uint,) * 4)
    return function


def _text(kernels: Sequence[cuda.Kernel]) -> str:
    """C++ of kernels of one source."""
    name = kernels[0].source
    text = (cuda.FOLDER / f"{name}.cu").read_text()
    return (
        f'// {kernels[0].expression} ...\n#include "emulation.hpp"\n#line 1 "{name}.cu"\n{text}\n'
        "#define PARAMETERS void** arguments, int number, unsigned blocks, unsigned threads, unsigned shared, unsigned seed\n"
        + "".join(
            f'extern "C" int run{i}(PARAMETERS) {{\n'
            f"    return emulation::launch(&{kernel.expression}, arguments, number, blocks, threads, shared, seed);\n}}\n"
            for i, kernel in enumerate(kernels)
        )
    )


def build(kernels: Iterable[cuda.Kernel], sanitize: bool = False) -> None:
    """Build many at once, those of a source together: it is read once, which takes longer than to compile one of its kernels."""
    by_source: dict[str, list[cuda.Kernel]] = {}
    for kernel in sorted(kernels):
        by_source.setdefault(kernel.source, []).append(kernel)
    groups = [some[i : i + TOGETHER] for some in by_source.values() for i in range(0, len(some), TOGETHER)]
    with ThreadPoolExecutor() as pool:
        for group, library in zip(groups, pool.map(lambda group: _build(_text(group), *_flags(sanitize)), groups)):
            _built.update({(kernel, sanitize): (library, f"run{i}") for i, kernel in enumerate(group)})
