"""What is done to a block of a product's rows while they are in L2: bias, GELU or its derivative, residual, rounding to a narrower type.

`core/epilogue.py` lists the flags, in the order in which they act.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from ..core.epilogue import BIAS_COLUMN, BIAS_ROW, CONVERT, GELU, GELU_GRADIENT, KEEP, RESIDUAL, TANH
from .compile import routine
from .kernel import kernel
from .math import gelu_erf, gelu_rounded, gelu_tanh
from .operands import Epilogue, Matrix
from .run import call_entry
from .views import item_bytes, view, zero_of


class Block(NamedTuple):
    """The rows of C, from `first` on, that an epilogue is for."""

    first: int
    rows: int
    columns: int


@kernel
def _epilogue(band, bands, sums, outs, block, values, c, epilogue):
    """The epilogue over a block of C's rows: from sums at `values` to C at c; `pre` and `extra` are of C's type and begin at its rows.

    sums, outs: empty arrays of the two types.
    """
    zero, out_zero = zero_of(sums), zero_of(outs)
    item, size = item_bytes(zero), item_bytes(out_zero)
    flags, first, columns = epilogue.flags, block.first, block.columns
    biases = view(zero, epilogue.bias)
    rounding = flags & (GELU | CONVERT | TANH | RESIDUAL) == GELU | CONVERT  # by far the commonest GELU in bfloat16
    for i in range(block.rows):
        line = view(zero, values.address + i * values.row * item)
        out = view(out_zero, c.address + i * c.row * size)
        before = view(out_zero, epilogue.pre + i * epilogue.row * size)
        others = view(out_zero, epilogue.extra + i * epilogue.row * size)
        if flags & BIAS_COLUMN:
            for j in range(columns):
                line[j] += biases[j]
        if flags & BIAS_ROW:
            for j in range(columns):
                line[j] += biases[first + i]
        if flags & GELU:
            if rounding and flags & KEEP:
                for j in range(columns):
                    before[j] = line[j]
                    out[j] = gelu_rounded(line[j])
            elif rounding:
                for j in range(columns):
                    out[j] = gelu_rounded(line[j])
            elif flags & TANH and flags & KEEP:
                for j in range(columns):
                    before[j] = line[j]
                    line[j] = gelu_tanh(line[j])[0]
            elif flags & TANH:
                for j in range(columns):
                    line[j] = gelu_tanh(line[j])[0]
            elif flags & KEEP:
                for j in range(columns):
                    before[j] = line[j]
                    line[j] = gelu_erf(line[j])[0]
            else:
                for j in range(columns):
                    line[j] = gelu_erf(line[j])[0]
        if flags & GELU_GRADIENT:
            if flags & TANH:
                for j in range(columns):
                    activated, slope = gelu_tanh(zero + before[j])
                    line[j] *= slope
                    others[j] = activated
            else:
                for j in range(columns):
                    activated, slope = gelu_erf(zero + before[j])
                    line[j] *= slope
                    others[j] = activated
        if flags & RESIDUAL:
            for j in range(columns):
                line[j] += others[j]
        if flags & CONVERT and not rounding:
            for j in range(columns):
                out[j] = line[j]


@routine
def finish(entry, room, block, values, c, epilogue):
    """Call the epilogue of `finish_entry`, with a table of 19 int64 at `room`."""
    table = view(0, room)
    table[0], table[1], table[2], table[3], table[4] = 1, 0, 0, 0, 0
    table[5], table[6], table[7] = block.first, block.rows, block.columns
    table[8], table[9], table[10] = values.address, values.row, values.column
    table[11], table[12], table[13] = c.address, c.row, c.column
    table[14], table[15], table[16], table[17], table[18] = epilogue.flags, epilogue.bias, epilogue.pre, epilogue.extra, epilogue.row
    call_entry(entry, 0, room)


@cache
def finish_entry(accumulator: np.dtype, dtype: np.dtype) -> int:
    """The address of the compiled epilogue from sums of the first type to an output of the second."""
    matrix = Matrix(0, 0, 0)
    arguments = np.empty(0, accumulator), np.empty(0, dtype), Block(0, 0, 0), matrix, matrix, Epilogue(0, 0, 0, 0, 0)
    return _epilogue.prepare(1, arguments)[0]
