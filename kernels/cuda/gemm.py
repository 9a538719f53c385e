"""The matrix product of all ops on a GPU, by cuBLASLt, and sums over rows.

cuBLASLt can also apply GELU, but only its tanh approximation, and cannot add a bias per row, as in token mixing. For these, a kernel of
`epilogue.cu` makes one more pass.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..core import epilogue
from ..core.arrays import empty, empty_like
from ..core.devices import runtime
from ..core.dtypes import accumulator_dtype, result_dtype
from ..core.recording import launch
from ..core.strides import ADD
from .kernel import Source
from .product import WORKSPACE, Product, current_rank
from .strided import astype, combine, convert, grid_for, sum_into, vector_width

_source = Source("cuda/epilogue")


def gemm(
    c: Any,
    a: Any,
    b: Any,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    sum_batch: bool = False,
    running: Any = None,
    flags: int = 0,
    bias: Any = None,
    pre: Any = None,
    extra: Any = None,
    exact: bool = False,
) -> None:
    """c = epilogue(a·b); see `cpu.gemm.gemm`. Every product is `exact`."""
    if flags and (sum_batch or running is not None):
        raise ValueError("gemm: a sum over the batch, or with what runs already, has no epilogue")
    by_row, tanh = bool(flags & epilogue.BIAS_ROW), bool(flags & epilogue.TANH)
    residual = extra if flags & epilogue.RESIDUAL else running
    if sum_batch:
        total = c if running is None else empty_like(c)
        _multiply_summed(total, a, b, transpose_a, transpose_b)
        if running is not None:
            combine(ADD, c, running, total)
    elif flags & epilogue.GELU_GRADIENT:
        _multiply(c, a, b, transpose_a, transpose_b)
        gelu_gradient(c, extra, c, pre, tanh)
    elif flags & epilogue.GELU or by_row or (bias is not None and c.dtype == np.float64):  # cuBLASLt has no bias for float64
        late_bias = None if flags & epilogue.GELU and not by_row and c.dtype != np.float64 else bias
        sums = c if pre is None else pre
        if late_bias is not None:  # so that the result is rounded only after the bias is added
            sums = empty(c.shape, accumulator_dtype(c.dtype), "cuda")
        _multiply(sums, a, b, transpose_a, transpose_b, bias if late_bias is None else None)
        rows, columns = c.shape[-2:]
        pre_output = None if late_bias is None else pre
        width = vector_width(columns, *(m for m in (c, pre_output, sums, residual) if m is not None))
        activation = (2 if tanh else 1) if flags & epilogue.GELU else 0
        kernel = _source("finish", c.dtype, sums.dtype, width, activation)
        launch(kernel, grid_for(c.size // width), c, pre_output, sums, late_bias, residual, c.size, rows, columns, by_row)
    else:
        _multiply(c, a, b, transpose_a, transpose_b, bias, residual)


def symmetric_product(
    c: Any,
    a: Any,
    b: Any,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    scale: float = 1.0,
    extra: Any = None,
    extra_scale: float = 1.0,
    diagonal: float = 0.0,
) -> None:
    """c = scale·(a·b) + extra_scale·extra + diagonal·I; see `cpu.symmetric.symmetric_product`. All of the product is computed."""
    if scale == 1.0 and extra is None and not diagonal:
        return _multiply(c, a, b, transpose_a, transpose_b)
    sums = empty(c.shape, accumulator_dtype(c.dtype), "cuda")
    _multiply(sums, a, b, transpose_a, transpose_b)
    launch(_source("add_terms", c.dtype), grid_for(c.size), c, sums, extra, c.size, c.shape[-1], scale, extra_scale, diagonal)


def gelu_gradient(dx: Any, a: Any, dy: Any, x: Any, tanh_form: bool) -> None:
    """dx = dy·gelu'(x), and a = gelu(x) unless it is None; dx may be dy."""
    width = vector_width(x.size, *(m for m in (dx, a, dy, x) if m is not None))
    launch(_source("gelu_backward", x.dtype, width, tanh_form), grid_for(x.size // width), dx, a, dy, x, x.size)


def parameter_gradients(dw: Any, db: Any, dy: Any, x: Any, running: Any) -> None:
    """Of y = x·wᵀ + b: dw = dyᵀ·x + running, db = the sums of dy over its rows; see `cpu.gemm.parameter_gradients`.

    cuBLASLt can sum dy in the product that reads it anyway. Where it cannot, or would split that product less, dy is read a second time.
    """
    if dw is not None:
        a, b = _of_one_type(dy, x)
        product = _product(dw, a, b, True, False)._replace(sums=True)
        if db is not None and db.dtype == dw.dtype and runtime().sums(product, a.dtype, dw.dtype):
            return launch(product, None, dw, a, b, db, running, empty((WORKSPACE,), np.uint8, "cuda"))
        gemm(dw, a, b, transpose_a=True, running=running)
    if db is not None:
        column_sums(db, dy)


def _of_one_type(a: Any, b: Any) -> tuple[Any, Any]:
    """Both, converted to the narrower of their types."""
    dtype = result_dtype([a.dtype, b.dtype])
    return astype(a, dtype), astype(b, dtype)


def _product(c: Any, a: Any, b: Any, transpose_a: bool, transpose_b: bool) -> Product:
    batch, (rows, columns), depth = len(c) if c.ndim == 3 else 1, c.shape[-2:], a.shape[-2] if transpose_a else a.shape[-1]
    return Product(batch, rows, columns, depth, _step(a), _step(b), transpose_a, transpose_b, rank=current_rank())


def _multiply(c: Any, a: Any, b: Any, transpose_a: bool, transpose_b: bool, bias: Any = None, extra: Any = None) -> None:
    """c = a·b + bias + extra, optionally with a or b transposed. If their types differ, both are converted to the narrower one."""
    a, b = _of_one_type(a, b)
    if c.dtype not in (a.dtype, accumulator_dtype(a.dtype)):  # cuBLASLt has no such product
        sums = empty(c.shape, a.dtype, "cuda")
        _multiply(sums, a, b, transpose_a, transpose_b, bias, None if extra is None else astype(extra, a.dtype))
        return convert(c, sums)
    product = _product(c, a, b, transpose_a, transpose_b)
    bias = None if bias is None else astype(bias, c.dtype)
    launch(product, None, c, a, b, bias, extra, empty((WORKSPACE,), np.uint8, "cuda"))


def _multiply_summed(c: Any, a: Any, b: Any, transpose_a: bool, transpose_b: bool) -> None:
    """The sum of the products of a batch; cuBLASLt cannot do this, so they are summed afterwards."""
    batch = max(len(m) for m in (a, b) if m.ndim == 3)
    parts = empty((batch, *c.shape), accumulator_dtype(result_dtype([a.dtype, b.dtype])), "cuda")
    _multiply(parts, a, b, transpose_a, transpose_b)
    sum_into(c.reshape(-1), parts.reshape(batch, -1))


def _step(m: Any) -> int:
    return prod(m.shape[-2:]) if m.ndim == 3 and len(m) > 1 else 0


def column_sums(out: Any, x: Any) -> None:
    """out (C,) = the sums of x (..., C) over all rows."""
    sum_into(out, x.reshape(-1, x.shape[-1]))


def row_sums(out: Any, x: Any) -> None:
    """out (N,) = the sums of x (B, N, C) over samples and channels."""
    sum_into(out.reshape(1, -1, 1), x)
