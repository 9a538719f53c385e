"""The epilogue of a block of rows while they are in L2: bias, GELU or its derivative, residual, rounding to a narrower type.

`core/epilogue.py` lists the flags in the order in which they are applied.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from ..core.epilogue import BIAS_COLUMN, BIAS_ROW, CONVERT, GELU, GELU_GRADIENT, KEEP, RESIDUAL, SCALED, TANH
from .compile import routine
from .kernel import Address, kernel
from .math import gelu_erf, gelu_rounded, gelu_tanh
from .operands import NO_EPILOGUE, Matrix
from .views import call_entry, item_bytes, view, zero_of


class Block(NamedTuple):
    """The size of a block of C, and its first row."""

    first: int
    rows: int
    columns: int


@kernel
def _epilogue(band, bands, sums, outs, block, values, c, epilogue):
    """Apply the epilogue to a block of C's rows, from the sums in `values` to c; `pre` and `extra` have C's type and start at the block.

    sums, outs: empty arrays that carry the two dtypes.
    """
    zero, out_zero = zero_of(sums), zero_of(outs)
    item, size = item_bytes(zero), item_bytes(out_zero)
    flags, first, columns = epilogue.flags, block.first, block.columns
    biases = view(zero, epilogue.bias)
    row_scales, column_scales = view(zero, epilogue.row_scales), view(zero, epilogue.column_scales)
    rounding = flags & (GELU | CONVERT | TANH | RESIDUAL) == GELU | CONVERT  # the usual GELU in bfloat16
    for i in range(block.rows):
        row = view(zero, values.address + i * values.row * item)
        out = view(out_zero, c.address + i * c.row * size)
        pre = view(out_zero, epilogue.pre + i * epilogue.row * size)
        extra = view(out_zero, epilogue.extra + i * epilogue.row * size)
        if flags & SCALED:
            scale = row_scales[first + i]
            for j in range(columns):
                row[j] *= scale * column_scales[j]
        if flags & BIAS_COLUMN:
            for j in range(columns):
                row[j] += biases[j]
        if flags & BIAS_ROW:
            for j in range(columns):
                row[j] += biases[first + i]
        if flags & GELU:
            if rounding and flags & KEEP:
                for j in range(columns):
                    pre[j] = row[j]
                    out[j] = gelu_rounded(row[j])
            elif rounding:
                for j in range(columns):
                    out[j] = gelu_rounded(row[j])
            elif flags & TANH and flags & KEEP:
                for j in range(columns):
                    pre[j] = row[j]
                    row[j] = gelu_tanh(row[j])[0]
            elif flags & TANH:
                for j in range(columns):
                    row[j] = gelu_tanh(row[j])[0]
            elif flags & KEEP:
                for j in range(columns):
                    pre[j] = row[j]
                    row[j] = gelu_erf(row[j])[0]
            else:
                for j in range(columns):
                    row[j] = gelu_erf(row[j])[0]
        if flags & GELU_GRADIENT:
            if flags & TANH:
                for j in range(columns):
                    activated, slope = gelu_tanh(zero + pre[j])
                    row[j] *= slope
                    extra[j] = activated
            else:
                for j in range(columns):
                    activated, slope = gelu_erf(zero + pre[j])
                    row[j] *= slope
                    extra[j] = activated
        if flags & RESIDUAL:
            for j in range(columns):
                row[j] += extra[j]
        if flags & CONVERT and not rounding:
            for j in range(columns):
                out[j] = row[j]


@routine
def finish(entry, table_address, block, values, c, epilogue):
    """Call the epilogue compiled by `finish_entry`; `table_address` has space for 21 int64."""
    table = view(0, table_address)
    table[0], table[1], table[2], table[3], table[4] = 1, 0, 0, 0, 0
    table[5], table[6], table[7] = block.first, block.rows, block.columns
    table[8], table[9], table[10] = values.address, values.row, values.column
    table[11], table[12], table[13] = c.address, c.row, c.column
    table[14], table[15], table[16], table[17], table[18] = epilogue.flags, epilogue.bias, epilogue.pre, epilogue.extra, epilogue.row
    table[19], table[20] = epilogue.row_scales, epilogue.column_scales
    call_entry(entry, 0, table_address)


@cache
def finish_entry(accumulator: np.dtype, dtype: np.dtype) -> Address:
    """The compiled epilogue for sums and outputs of these dtypes."""
    matrix = Matrix(0, 0, 0)
    arguments = np.empty(0, accumulator), np.empty(0, dtype), Block(0, 0, 0), matrix, matrix, NO_EPILOGUE
    return Address(_epilogue, arguments)
