"""Compiling a kernel's source to machine code with NVIDIA's run-time compiler; no GPU is needed.

The sources include only each other (`*.cuh`), so that the CUDA toolkit need not be installed and a compilation takes about 0.1 s.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from ...errors import DeviceError
from . import kernel as naming
from .kernel import Kernel

OPTIONS = ("--std=c++17", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "--ptxas-options=-v")

# Patterns in the compiler's log, in the order of the fields of Usage.
USAGE = r"Used (\d+) registers", r"(\d+) bytes spill stores, (\d+) bytes spill loads", r"(\d+) bytes smem"

_loading = threading.Lock()


class Binary(NamedTuple):
    """The machine code of one kernel."""

    name: str  # of the function
    code: bytes  # a cubin
    log: str  # the compiler's output, with registers and spills


class Usage(NamedTuple):
    """The resources that a kernel uses on a multiprocessor."""

    registers: int  # per thread
    spilled: int  # bytes of spill stores and loads per thread
    shared: int  # bytes of static shared memory per block


def _library() -> ctypes.CDLL:
    with _loading:
        return _loaded()


@cache
def _loaded() -> ctypes.CDLL:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        raise DeviceError("CUDA kernels need the package cuda-pathfinder: install minivit[cuda]") from None
    try:
        path = load_nvidia_dynamic_lib("nvrtc").abs_path
    except Exception as error:  # its class is not documented
        raise DeviceError(f"CUDA kernels need NVRTC 13, which was not found: install minivit[cuda] ({type(error).__name__})") from None
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _compiler() -> ctypes.CDLL:
    """The library, ready to compile in several threads."""
    library = _library()
    with _loading:
        _compile_nothing(library)
    return library


@cache
def _compile_nothing(library: ctypes.CDLL) -> None:
    """The first compilation loads a second library, and fails if several threads do so at once."""
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), b"", b"nothing.cu", 0, None, None)
    library.nvrtcCompileProgram(program, 0, None)
    library.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def version() -> tuple[int, int]:
    """The compiler's version. Raises DeviceError if there is no compiler."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "its version")
    return major.value, minor.value


def _check(status: int, what: str) -> None:
    if status:
        raise DeviceError(f"NVRTC: {what} failed: {_library().nvrtcGetErrorString(status).decode()}")


@cache
def headers() -> dict[str, str]:
    """The header files, by name."""
    return {path.name: path.read_text() for path in sorted((naming.FOLDER / "cuda").glob("*.cuh"))}


def source_of(kernel: Kernel) -> str:
    """The text of a kernel's .cu file."""
    return (naming.FOLDER / f"{kernel.source}.cu").read_text()


def compile_kernel(kernel: Kernel, architecture: str) -> Binary:
    """Machine code for an architecture: "sm_80", "sm_90", ... Raises DeviceError with the compiler's messages."""
    return compile_kernels(kernel.source, [kernel], architecture)[0]


def compile_kernels(source: str, kernels: Sequence[Kernel], architecture: str) -> list[Binary]:
    """The same for several kernels of one source, which are compiled together."""
    library, program = _compiler(), ctypes.c_void_p()
    included = headers()
    names = (ctypes.c_char_p * len(included))(*map(str.encode, included))
    texts = (ctypes.c_char_p * len(included))(*map(str.encode, included.values()))
    text = source_of(kernels[0]).encode()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text, f"{source}.cu".encode(), len(included), texts, names), "a program")
    try:
        for kernel in kernels:
            _check(library.nvrtcAddNameExpression(program, kernel.expression.encode()), kernel.expression)
        options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture={architecture}")]
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _text(program, "ProgramLog")
        if status:
            raise DeviceError(f"{source}.cu does not compile for {architecture}:\n{log}")
        code = _bytes(program, "CUBIN")
        binaries = []
        for kernel in kernels:
            name = ctypes.c_char_p()
            _check(library.nvrtcGetLoweredName(program, kernel.expression.encode(), ctypes.byref(name)), kernel.expression)
            binaries.append(Binary((name.value or b"").decode(), code, log))
        return binaries
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer), what)
    return buffer.raw


def _text(program: ctypes.c_void_p, what: str) -> str:
    return _bytes(program, what).rstrip(b"\0").decode(errors="replace")


def usage(binaries: Iterable[Binary]) -> dict[str, Usage]:
    """The resources of each kernel by function name, from the compiler's log."""
    usages: dict[str, Usage] = {}
    for binary in binaries:
        for part in binary.log.split("Compiling entry function '")[1:]:
            name = part[: part.index("'")]
            usages[name] = Usage(*(sum(map(int, n.groups())) if (n := re.search(pattern, part)) else 0 for pattern in USAGE))
    return usages
