"""Matrix products on a GPU, by cuBLASLt, as kernels like any other: recorded, and captured into a graph.

    c = a·b + bias + extra,    a (batch, M, K), b (batch, K, N), bias (N,), extra and c (batch, M, N), all C-contiguous; 16-bit numbers are
                               summed in float32, others in their own type, never in TF32

CuPy's own products raise an error while a graph is captured, and nvmath-python would be one more dependency for the ten functions that are
needed here (`cublaslt.py`). The workspace is an array like any other, so that it lives as long as what was recorded with it.

cuBLASLt could also apply GELU, but only the form with tanh, and adds no bias a row, as token mixing has. Where these follow, a kernel of
`epilogue.cu` does them in one more pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .. import device
from ..copying import converted, grid_for, sum_into, vector_width
from ..cpu import epilogue
from ..gelu import gelu_gradient
from ..op import launch
from . import Source, runtime

WORKSPACE = 32 << 20  # bytes: what NVIDIA advises for Hopper
_source = Source("cuda/epilogue")


class Product(NamedTuple):
    """The shape of a product. Steps: elements from one matrix of the batch to the next, 0 where all share one."""

    batch: int
    rows: int  # M
    columns: int  # N
    depth: int  # K
    a_step: int
    b_step: int
    transpose_a: bool  # a is stored as (batch, K, M)
    transpose_b: bool  # b is stored as (batch, N, K)

    @property
    def prepares(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"product {self.batch}x{self.rows}x{self.columns}x{self.depth}"

    def run(self, grid: None, arguments: Sequence[Any]) -> None:
        """arguments: c, a, b, bias or None, extra or None, workspace."""
        runtime().multiply(self, arguments)


def gemm_cuda(
    c: Any, a: Any, b: Any, transpose_a: bool, transpose_b: bool, sum_batch: bool, flags: int, bias: Any, pre: Any, extra: Any
) -> None:
    """`gemm.gemm` on a GPU."""
    by_row, tanh = bool(flags & epilogue.BIAS_ROW), bool(flags & epilogue.TANH)
    residual = extra if flags & epilogue.RESIDUAL else None
    if sum_batch:
        _multiply_summed(c, a, b, transpose_a, transpose_b)
    elif flags & epilogue.GELU_GRADIENT:
        _multiply(c, a, b, transpose_a, transpose_b)
        gelu_gradient(c, extra, c, pre, tanh)
    elif flags & epilogue.GELU or by_row or (bias is not None and c.dtype == np.float64):  # for which cuBLASLt has no bias
        after = None if flags & epilogue.GELU and not by_row and c.dtype != np.float64 else bias
        sums = c if pre is None else pre
        if after is not None:  # rounded once, when the bias is in it
            sums = device.empty(c.shape, device.accumulator(c.dtype), "cuda")
        _multiply(sums, a, b, transpose_a, transpose_b, bias if after is None else None)
        rows, columns = c.shape[-2:]
        kept = None if after is None else pre
        width = vector_width(columns, *(m for m in (c, kept, sums, residual) if m is not None))
        activation = (2 if tanh else 1) if flags & epilogue.GELU else 0
        kernel = _source("finish", c.dtype, sums.dtype, width, activation)
        launch(kernel, grid_for(c.size // width), c, kept, sums, after, residual, c.size, rows, columns, by_row)
    else:
        _multiply(c, a, b, transpose_a, transpose_b, bias, residual)


def _multiply(c: Any, a: Any, b: Any, transpose_a: bool, transpose_b: bool, bias: Any = None, extra: Any = None) -> None:
    """c = a·b + bias + extra, or of the transposes. Of two types, the narrower is what is multiplied."""
    dtype = device.common([a.dtype, b.dtype])
    a, b = converted(a, dtype), converted(b, dtype)
    rows, columns = c.shape[-2:]
    product = Product(
        len(c) if c.ndim == 3 else 1,
        rows,
        columns,
        a.shape[-2] if transpose_a else a.shape[-1],
        _step(a),
        _step(b),
        transpose_a,
        transpose_b,
    )
    bias = None if bias is None else converted(bias, c.dtype)
    launch(product, None, c, a, b, bias, extra, device.empty((WORKSPACE,), np.uint8, "cuda"))


def _multiply_summed(c: Any, a: Any, b: Any, transpose_a: bool, transpose_b: bool) -> None:
    """The sum of all products of a batch, which cuBLASLt has not: they are summed afterwards."""
    batch = max(len(m) for m in (a, b) if m.ndim == 3)
    parts = device.empty((batch, *c.shape), device.accumulator(device.common([a.dtype, b.dtype])), "cuda")
    _multiply(parts, a, b, transpose_a, transpose_b)
    sum_into(c.reshape(-1), parts.reshape(batch, -1))


def _step(m: Any) -> int:
    return prod(m.shape[-2:]) if m.ndim == 3 and len(m) > 1 else 0
