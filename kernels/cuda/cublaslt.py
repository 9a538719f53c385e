"""The ten functions of cuBLASLt that a product needs (NVIDIA's cuBLAS documentation, chapter "Using the cuBLASLt API").

cuBLASLt stores matrices in column-major order, so that a row-major matrix is the transpose of one of its matrices. c = a·b is therefore
computed as cᵀ = bᵀ·aᵀ, and its bias, one number per row of its output, is one per column of c. a is its B, whose sums over K are what it
calls the gradient of a bias: one number per column of its output, of the output's type, for neither batches nor float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_double, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

import numpy as np

from ...errors import DeviceError
from .product import WORKSPACE, Product

TYPES = {"float32": 0, "float64": 1, "bfloat16": 14}  # cudaDataType_t
COMPUTE_32F, COMPUTE_64F = 68, 70  # cublasComputeType_t: float32 as such, without TF32
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
BATCH, BATCH_STEP = 5, 6  # cublasLtMatrixLayoutAttribute_t
MAX_WORKSPACE, ALIGNMENTS = 1, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t; alignments of A, B, C, D
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


class _Result(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4))


class _Matmul(NamedTuple):
    """The cuBLASLt objects for a product of certain types, reused by each call."""

    description: c_void_p
    layouts: tuple[c_void_p, ...]  # of A, B, C, D
    algorithm: Any
    one: Any
    beta: Any


class CublasLt:
    """cuBLASLt, loaded from the library at `path`."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._handle = c_void_p()
        self._call("cublasLtCreate", byref(self._handle))
        self._matmuls: dict[tuple, _Matmul] = {}
        self._fills: dict[tuple, bool] = {}

    def run(self, product: Product, arrays: tuple, addresses: tuple[int, ...], workspace: int, stream: int) -> None:
        """c = a·b + bias + extra, or bias = the sums of a if the product `sums`, on `stream`.

        arrays: c, a, b, bias or None, extra or None, for their dtypes. addresses: of these (0 for None) and of the workspace.
        """
        c, a, b, bias, extra, workspace_address = addresses
        alignments = tuple(min(address & -address, MAX_ALIGNMENT) for address in (b, a, extra or c, c, bias))
        key = product, tuple(None if a is None else a.dtype.char for a in arrays[:5]), alignments
        matmul = self._matmuls.get(key)
        if matmul is None:
            matmul = self._matmuls[key] = self._make_matmul(product, arrays, bias, workspace, alignments[:4])
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
            byref(matmul.algorithm),
            c_void_p(workspace_address),
            c_size_t(workspace),
            c_void_p(stream),
        )

    def fills(self, product: Product, dtype: np.dtype, c_dtype: np.dtype) -> bool:
        """Whether there is an algorithm for the product with its sums that occupies the GPU at least half as well as one without them.

        A weight's gradient has few tiles and a long K, so that an algorithm that cannot split K leaves most of the GPU idle.
        """
        key = product, dtype.char, c_dtype.char
        if key not in self._fills:
            waves = []
            for each in (product._replace(sums=False), product):
                description, layouts, _ = self._describe(each, c_dtype, dtype, dtype, PLACEHOLDER if each.sums else 0)
                found = self._ranked(description, layouts, WORKSPACE, (MAX_ALIGNMENT,) * 4, 1)
                waves.append(found[0].waves if found else -1.0)
            self._fills[key] = waves[1] >= max(0.0, min(waves[0], 1.0) / 2)
        return self._fills[key]

    def _make_matmul(self, product: Product, arrays: tuple, bias: int, workspace: int, alignments: tuple[int, ...]) -> _Matmul:
        c, a, b, _, extra = arrays[:5]
        description, layouts, number = self._describe(product, c.dtype, a.dtype, b.dtype, bias)
        algorithms = self._ranked(description, layouts, workspace, alignments, product.rank + 1)
        if not algorithms:
            raise DeviceError(f"cuBLASLt has no algorithm for a {product.label}")
        return _Matmul(description, layouts, algorithms[-1].algorithm, number(1), number(extra is not None))

    def _describe(self, product: Product, c: np.dtype, a: np.dtype, b: np.dtype, bias: int) -> tuple[c_void_p, tuple[c_void_p, ...], Any]:
        """The description of a product of such types, with a bias at an address unless it is 0, the layouts, and the type of alpha."""
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
        return description, layouts, number

    def _layout(self, dtype: np.dtype, size: tuple[int, int], product: Product, step: int) -> c_void_p:
        """The layout of a matrix of (rows, columns) in cuBLASLt's column-major order."""
        layout, (rows, columns) = c_void_p(), size
        self._call("cublasLtMatrixLayoutCreate", byref(layout), TYPES[dtype.name], c_uint64(rows), c_uint64(columns), c_int64(rows))
        if product.batch > 1:
            self._call("cublasLtMatrixLayoutSetAttribute", layout, BATCH, byref(c_int(product.batch)), c_size_t(4))
            self._call("cublasLtMatrixLayoutSetAttribute", layout, BATCH_STEP, byref(c_int64(step)), c_size_t(8))
        return layout

    def _ranked(
        self, description: c_void_p, layouts: tuple[c_void_p, ...], workspace: int, alignments: tuple[int, ...], most: int
    ) -> list[_Result]:
        """At most so many algorithms, in the order of cuBLASLt's heuristic; none if it has none."""
        preference, results, count = c_void_p(), (_Result * most)(), c_int()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        self._set("Preference", preference, MAX_WORKSPACE, c_uint64(workspace))
        for attribute, alignment in zip(ALIGNMENTS, alignments):
            self._set("Preference", preference, attribute, ctypes.c_uint32(alignment))
        name = "cublasLtMatmulAlgoGetHeuristic"
        status = getattr(self._library, name)(self._handle, description, *layouts, preference, most, results, byref(count))
        self._call("cublasLtMatmulPreferenceDestroy", preference)
        if status and status != NOT_SUPPORTED:
            raise DeviceError(f"{name} failed: {STATUS.get(status, f'status {status}')}")
        return list(results[: count.value]) if status == 0 else []

    def _set(self, kind: str, descriptor: c_void_p, attribute: int, value: Any) -> None:
        self._call(f"cublasLtMatmul{kind}SetAttribute", descriptor, attribute, byref(value), c_size_t(ctypes.sizeof(value)))

    def _call(self, name: str, *arguments: Any) -> None:
        function: Callable = getattr(self._library, name)
        status = function(*arguments)
        if status:
            raise DeviceError(f"{name} failed: {STATUS.get(status, f'status {status}')}")
