"""The twelve functions of cuBLASLt that a product needs (NVIDIA's cuBLAS documentation, chapter "Using the cuBLASLt API").

cuBLASLt stores matrices in column-major order, so that a row-major matrix is the transpose of one of its matrices. c = a·b is therefore
computed as cᵀ = bᵀ·aᵀ, and its bias, one number per row of its output, is one per column of c. a is its B, whose sums over K are what it
calls the gradient of a bias: one number per column of its output, of the output's type, for neither batches nor float64.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import byref, c_double, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from ...errors import DeviceError
from .choices import CANDIDATES, Choices, Device
from .product import WORKSPACE, Product

TYPES = {"float32": 0, "float64": 1, "bfloat16": 14}  # cudaDataType_t
COMPUTE_32F, COMPUTE_64F = 68, 70  # cublasComputeType_t: float32 as such, without TF32
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
BATCH, BATCH_STEP = 5, 6  # cublasLtMatrixLayoutAttribute_t
MAX_WORKSPACE, REDUCTIONS, ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t; alignments of A, B, C, D
IN_COMPUTE_TYPE, IN_OUTPUT_TYPE = 2, 4  # cublasLtReductionScheme_t: how sums of parts of K become one, always in the same order
MAX_ALIGNMENT = 16  # bytes: the widest load of an algorithm
EPILOGUE_BIAS, EPILOGUE_SUMS = 4, 512  # cublasLtEpilogue_t: BIAS, BGRADB
STATUS = {
    1: "it is not initialised",
    3: "out of memory",
    7: "a wrong value",
    8: "this GPU is too old",
    13: "a kernel failed",
    14: "an internal error",
    15: "not supported",
}
NOT_SUPPORTED = 15
PLACEHOLDER = 256  # an address of an array that is not known yet


_Algorithm: Any = c_uint64 * 8  # cublasLtMatmulAlgo_t


class _Result(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (("algorithm", _Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4))


class _Matmul(NamedTuple):
    """The cuBLASLt objects for a product of certain types, reused by each call."""

    description: c_void_p
    layouts: tuple[c_void_p, ...]  # of A, B, C, D
    one: Any
    beta: Any
    reductions: int


class _Call(NamedTuple):
    """A product on certain arrays. Addresses may be 0: of no bias, of nothing that is added."""

    product: Product
    arrays: tuple  # c, a, b, bias or None, extra or None, for their dtypes
    addresses: tuple[int, ...]  # of these, and of the workspace
    workspace: int  # bytes
    stream: int

    @property
    def types(self) -> tuple[np.dtype, ...]:
        """Of c, a and b."""
        return tuple(array.dtype for array in self.arrays[:3])

    @property
    def alignments(self) -> tuple[int, ...]:
        """Of A, B, C, D and the bias."""
        c, a, b, bias, extra, _ = self.addresses
        return tuple(min(address & -address, MAX_ALIGNMENT) for address in (b, a, extra or c, c, bias))

    @property
    def key(self) -> tuple:
        """What the choice of an algorithm depends on."""
        types = tuple(None if a is None else a.dtype.char for a in self.arrays)
        return self.product, types, self.alignments, self.addresses[4] == self.addresses[0], self.workspace

    @property
    def signature(self) -> str:
        """The same in words, for any process."""
        types = " ".join("none" if a is None else a.dtype.name for a in self.arrays)
        place = "in place" if self.addresses[4] == self.addresses[0] else "out of place"
        return f"{self.product}; c, a, b, bias, extra: {types}, {place}; aligned to {self.alignments}; workspace {self.workspace}"


class CublasLt:
    """cuBLASLt, loaded from the library at `path`, for one GPU."""

    def __init__(self, path: str, device: Device) -> None:
        self._library, self._device = ctypes.CDLL(path), device
        self._library.cublasLtGetVersion.restype = c_size_t
        self._handle = c_void_p()
        self._call("cublasLtCreate", byref(self._handle))
        self._choices = Choices(device, self._library.cublasLtGetVersion())
        self._matmuls: dict[tuple, tuple[_Matmul, Any]] = {}  # with the algorithm
        self._fills: dict[tuple, bool] = {}
        self._lock = threading.RLock()  # a description is changed before it is used

    def run(self, product: Product, arrays: tuple, addresses: tuple[int, ...], workspace: int, stream: int) -> None:
        """c = a·b + bias + extra, or bias = the sums of a if the product `sums`, on `stream`.

        arrays: c, a, b, bias or None, extra or None, for their dtypes. addresses: of these (0 for None) and of the workspace.
        """
        call = _Call(product, arrays, addresses, workspace, stream)
        with self._lock:
            key = call.key
            if key not in self._matmuls:
                self._matmuls[key] = self._chosen(call)
            self._launch(*self._matmuls[key], call)

    def prepare(self, product: Product, arrays: tuple, addresses: tuple[int, ...], workspace: int, stream: int) -> None:
        """Choose the algorithm for a product and load its kernel, so that it can be captured into a graph. Its result does not change."""
        call = _Call(product, arrays, addresses, workspace, stream)
        with self._lock:
            key = call.key
            if key not in self._matmuls:
                self._matmuls[key] = self._chosen(call)
                beside, scratch = self._beside(call)
                self._launch(*self._matmuls[key], beside)
                del scratch

    def fills(self, product: Product, dtype: np.dtype, c_dtype: np.dtype) -> bool:
        """Whether there is an algorithm for the product with its sums that occupies the GPU at least half as well as one without them.

        A weight's gradient has few tiles and a long K, so that an algorithm that cannot split K leaves most of the GPU idle.
        """
        key = product, dtype.char, c_dtype.char
        if key not in self._fills:
            waves = []
            for each in (product._replace(sums=False), product):
                matmul = self._make_matmul(each, (c_dtype, dtype, dtype), PLACEHOLDER if each.sums else 0, adds=False)
                found = self._ranked(matmul, WORKSPACE, (MAX_ALIGNMENT,) * 4, 1)
                waves.append(found[0].waves if found else -1.0)
            self._fills[key] = waves[1] >= max(0.0, min(waves[0], 1.0) / 2)
        return self._fills[key]

    def _launch(self, matmul: _Matmul, algorithm: Any, call: _Call) -> None:
        c, a, b, bias, extra, workspace = call.addresses
        if bias:
            self._set("Desc", matmul.description, BIAS_POINTER, c_uint64(bias))
        layout_a, layout_b, layout_c, layout_d = matmul.layouts
        self._call(
            "cublasLtMatmul",
            self._handle,
            matmul.description,
            byref(matmul.one),
            c_void_p(b),
            layout_a,
            c_void_p(a),
            layout_b,
            byref(matmul.beta),
            c_void_p(extra or c),
            layout_c,
            c_void_p(c),
            layout_d,
            byref(algorithm),
            c_void_p(workspace),
            c_size_t(call.workspace),
            c_void_p(call.stream),
        )

    def _beside(self, call: _Call) -> tuple[_Call, Any]:
        """The same product into memory of its own, which comes with it, as aligned as its result. Raises OutOfMemoryError."""
        c, a, b, bias, extra, workspace = call.addresses
        sums = (call.arrays[3].nbytes // MAX_ALIGNMENT + 2) * MAX_ALIGNMENT if call.product.sums else 0
        scratch = self._device.empty((sums + call.arrays[0].nbytes + MAX_ALIGNMENT,), np.dtype(np.uint8))
        start = self._device.address(scratch)
        bias = start + bias % MAX_ALIGNMENT if sums else bias
        start += sums + c % MAX_ALIGNMENT
        return call._replace(addresses=(start, a, b, bias, start if extra == c else extra, workspace)), scratch

    def _chosen(self, call: _Call) -> tuple[_Matmul, Any]:
        matmul = self._make_matmul(call.product, call.types, call.addresses[3], call.addresses[4] != 0)
        rank = call.product.rank
        if rank is not None:
            found = self._candidates(matmul, call, rank + 1)
            return matmul, _Algorithm.from_buffer_copy(found[min(rank, len(found) - 1)])
        beside = cache(partial(self._beside, call))
        chosen = self._choices.algorithm(
            call.signature,
            lambda algorithm: self._accepts(matmul, call, algorithm),
            lambda: self._candidates(matmul, call, CANDIDATES),
            lambda algorithm: self._launch(matmul, _Algorithm.from_buffer_copy(algorithm), beside()[0]),
        )
        return matmul, _Algorithm.from_buffer_copy(chosen)

    def _make_matmul(self, product: Product, types: tuple[np.dtype, ...], bias: int, adds: bool) -> _Matmul:
        """types: of c, a and b. bias: its address, 0 if there is none. adds: whether there is an extra."""
        c, a, b = types
        number, compute, scale = (c_double, COMPUTE_64F, "float64") if a == np.float64 else (c_float, COMPUTE_32F, "float32")
        description = c_void_p()
        self._call("cublasLtMatmulDescCreate", byref(description), compute, TYPES[scale])
        self._set("Desc", description, TRANSPOSE_A, c_int(product.transpose_b))
        self._set("Desc", description, TRANSPOSE_B, c_int(product.transpose_a))
        if bias:
            self._set("Desc", description, EPILOGUE, c_int(EPILOGUE_SUMS if product.sums else EPILOGUE_BIAS))
            self._set("Desc", description, BIAS_POINTER, c_uint64(bias))
        M, N, K = product.rows, product.columns, product.depth
        layouts = (
            self._layout(b, (K, N) if product.transpose_b else (N, K), product, product.b_step),
            self._layout(a, (M, K) if product.transpose_a else (K, M), product, product.a_step),
            *(self._layout(c, (N, M), product, M * N) for _ in range(2)),
        )
        exact = IN_OUTPUT_TYPE if c.name == scale else 0  # otherwise parts of a sum would be rounded
        return _Matmul(description, layouts, number(1), number(adds), IN_COMPUTE_TYPE | exact)

    def _layout(self, dtype: np.dtype, size: tuple[int, int], product: Product, step: int) -> c_void_p:
        """The layout of a matrix of (rows, columns) in cuBLASLt's column-major order."""
        layout, (rows, columns) = c_void_p(), size
        self._call("cublasLtMatrixLayoutCreate", byref(layout), TYPES[dtype.name], c_uint64(rows), c_uint64(columns), c_int64(rows))
        if product.batch > 1:
            self._call("cublasLtMatrixLayoutSetAttribute", layout, BATCH, byref(c_int(product.batch)), c_size_t(4))
            self._call("cublasLtMatrixLayoutSetAttribute", layout, BATCH_STEP, byref(c_int64(step)), c_size_t(8))
        return layout

    def _candidates(self, matmul: _Matmul, call: _Call, number: int) -> list[bytes]:
        """The first algorithms in the order of cuBLASLt's heuristic, at least one."""
        found = [bytes(result.algorithm) for result in self._ranked(matmul, call.workspace, call.alignments, number)]
        if not found:
            raise DeviceError(f"cuBLASLt has no algorithm for a {call.product.label}")
        return found

    def _ranked(self, matmul: _Matmul, workspace: int, alignments: tuple[int, ...], number: int) -> list[_Result]:
        """What cuBLASLt's heuristic says of its first algorithms, if it has any; each gives the same bits every time."""
        preference, results, count = c_void_p(), (_Result * number)(), c_int()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        try:
            self._set("Preference", preference, MAX_WORKSPACE, c_uint64(workspace))
            self._set("Preference", preference, REDUCTIONS, c_uint32(matmul.reductions))
            for attribute, alignment in zip(ALIGNMENTS, alignments):
                self._set("Preference", preference, attribute, c_uint32(alignment))
            arguments = self._handle, matmul.description, *matmul.layouts, preference, number, results, byref(count)
            self._call("cublasLtMatmulAlgoGetHeuristic", *arguments, allowed=NOT_SUPPORTED)
        finally:
            self._call("cublasLtMatmulPreferenceDestroy", preference)
        return [result for result in results[: count.value] if result.state == 0]

    def _accepts(self, matmul: _Matmul, call: _Call, algorithm: bytes) -> bool:
        """Whether cuBLASLt can run an algorithm that was kept."""
        result = _Result()
        status = self._library.cublasLtMatmulAlgoCheck(
            self._handle, matmul.description, *matmul.layouts, byref(_Algorithm.from_buffer_copy(algorithm)), byref(result)
        )
        return status == 0 and result.state == 0 and result.workspace <= call.workspace

    def _set(self, kind: str, descriptor: c_void_p, attribute: int, value: Any) -> None:
        self._call(f"cublasLtMatmul{kind}SetAttribute", descriptor, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def _call(self, name: str, *arguments: Any, allowed: int = 0) -> None:
        function: Callable = getattr(self._library, name)
        status = function(*arguments)
        if status not in (0, allowed):
            raise DeviceError(f"{name} failed: {STATUS.get(status, f'status {status}')}")
