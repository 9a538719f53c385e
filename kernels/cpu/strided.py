"""Copies, conversions, element-wise arithmetic and sums on a CPU, from which other ops are composed.

Copies and arithmetic treat arrays as flat, and axes as nested loops (`core/strides.py`). A sum over adjacent axes is a sum over R of an
array (A, R, C), where A and C are the sizes before and after these axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import isqrt, prod
from typing import Any

import numpy as np
from numba import njit

from ..core.arrays import empty
from ..core.dtypes import BFLOAT16
from ..core.op import Shape
from ..core.recording import launch
from ..core.strides import (
    DIVIDE,
    IS_LARGER,
    MAXIMUM,
    MINIMUM,
    MULTIPLY,
    POWER,
    POWER_BY_BASE,
    POWER_BY_EXPONENT,
    broadcast_strides,
    nests,
    reduction,
    strides,
)
from .compile import routine
from .kernel import Kernel, kernel, named_kernel, preparation
from .math import OPTIONS as INLINED
from .math import log, power
from .run import threads

CHUNK = 1024  # columns that are summed together
RUN = 128  # elements of a row in one partial sum
PARTS = 64  # partial sums of a long sum, independent of the number of threads
SMALL = 16384  # elements, up to which one thread is enough


def bands_for(size: int) -> int:
    """The number of bands for an element-wise loop over `size` elements."""
    return threads() if size > SMALL else 1


# --------------------------------------------------------------------------------------------------------------- copies
@routine
def offset(row, loops, array):
    """The offset of an array (its column in `loops`) in iteration `row` of the outer loops."""
    inner, row = row % loops[2, 0], row // loops[2, 0]
    return row // loops[1, 0] * loops[0, array] + row % loops[1, 0] * loops[1, array] + inner * loops[2, array]


@routine
def share(band, bands, loops):
    """A band's share: its range of iterations of the outer loops, and its range of the inner loop."""
    rows, inner = loops[0, 0] * loops[1, 0] * loops[2, 0], loops[3, 0]
    if rows < bands:
        return 0, rows, band * inner // bands, (band + 1) * inner // bands
    return band * rows // bands, (band + 1) * rows // bands, 0, inner


@kernel
def _copy(band, bands, y, x, loops, y_start, x_start, scale):
    factor = y.dtype.type(scale)
    first, last, start, stop = share(band, bands, loops)
    y_step, x_step = loops[3, 1], loops[3, 2]
    for row in range(first, last):
        y_offset, x_offset = y_start + offset(row, loops, 1), x_start + offset(row, loops, 2)
        for j in range(start, stop):  # unsigned indices: no test for negative ones
            y[np.uint64(y_offset + j * y_step)] = x[np.uint64(x_offset + j * x_step)] * factor


@kernel
def _fill(band, bands, y, value):
    for i in range(band * len(y) // bands, (band + 1) * len(y) // bands):
        y[i] = value


def copy(
    y: np.ndarray, x: np.ndarray, shape: Shape, y_steps: Shape, x_steps: Shape, y_start: int = 0, x_start: int = 0, scale: float = 1.0
) -> None:
    """y = scale·x over a shape, with a start and strides (in elements) for each array."""
    for loops, (y_offset, x_offset) in nests(shape, y_steps, x_steps):
        launch(_copy, bands_for(prod(shape)), y.reshape(-1), x.reshape(-1), loops, y_start + y_offset, x_start + x_offset, float(scale))


def fill(y: np.ndarray, value: float) -> None:
    """Set all elements of y to value."""
    launch(_fill, bands_for(y.size), y.reshape(-1), float(value))


@preparation
def _convert(band, bands, y, x):
    first, last = band * len(x) // bands, (band + 1) * len(x) // bands
    y, x = y[first:last], x[first:last]
    for i in range(len(x)):
        y[i] = x[i]


def convert(y: np.ndarray, x: np.ndarray) -> None:
    """y = x, converted to the floating-point type of y."""
    launch(_convert, bands_for(x.size), y.reshape(-1), x.reshape(-1))


def astype(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x converted to a floating-point type; x itself if it has that type."""
    if x.dtype == dtype:
        return x
    y = empty(x.shape, dtype)
    convert(y, x)
    return y


def in_float32(outputs: int) -> Callable:
    """Decorator for functions that accumulate in their outputs, the first `outputs` arguments: bfloat16 arrays are float32 inside."""

    def is_bfloat16(argument: Any) -> bool:
        return isinstance(argument, np.ndarray) and argument.dtype == BFLOAT16

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(*arguments):
            if not any(map(is_bfloat16, arguments)):
                return function(*arguments)
            widened = [
                a if not is_bfloat16(a) else empty(a.shape, np.float32) if i < outputs else astype(a, np.dtype(np.float32))
                for i, a in enumerate(arguments)
            ]
            function(*widened)
            for array, sums in zip(arguments[:outputs], widened):
                if sums is not array:
                    convert(array, sums)
            return None

        return run

    return decorate


# ----------------------------------------------------------------------------------------------------------- arithmetic
@kernel
def _combine(band, bands, y, a, b, loops, y_start, a_start, b_start, operation, sign):
    factor = y.dtype.type(sign)
    first, last, start, stop = share(band, bands, loops)
    a_step, b_step = loops[3, 2], loops[3, 3]
    multiplies = operation == MULTIPLY
    for row in range(first, last):
        y_offset = y_start + offset(row, loops, 1)
        a_offset, b_offset = a_start + offset(row, loops, 2), b_start + offset(row, loops, 3)
        if operation == DIVIDE:
            for j in range(start, stop):  # unsigned indices: no test for negative ones
                y[np.uint64(y_offset + j)] = a[np.uint64(a_offset + j * a_step)] / b[np.uint64(b_offset + j * b_step)]
        elif b_step == 0:
            v = b[b_offset]
            for j in range(start, stop):
                u = a[np.uint64(a_offset + j * a_step)]
                y[np.uint64(y_offset + j)] = u * v if multiplies else u + v * factor
        elif a_step == 0:
            u = a[a_offset]
            for j in range(start, stop):
                v = b[np.uint64(b_offset + j)]
                y[np.uint64(y_offset + j)] = u * v if multiplies else u + v * factor
        else:
            for j in range(start, stop):
                u, v = a[np.uint64(a_offset + j)], b[np.uint64(b_offset + j)]
                y[np.uint64(y_offset + j)] = u * v if multiplies else u + v * factor


def _combining(name: str, function: Callable[..., float]) -> Kernel:
    """A kernel like `_combine` for another function of two numbers."""
    value = njit(**INLINED)(function)

    def combine(band, bands, y, a, b, loops, y_start, a_start, b_start):
        first, last, start, stop = share(band, bands, loops)
        a_step, b_step = loops[3, 2], loops[3, 3]
        for row in range(first, last):
            y_offset = y_start + offset(row, loops, 1)
            a_offset, b_offset = a_start + offset(row, loops, 2), b_start + offset(row, loops, 3)
            if b_step == 0:
                v = b[b_offset]
                for j in range(start, stop):  # unsigned indices: no test for negative ones
                    y[np.uint64(y_offset + j)] = value(a[np.uint64(a_offset + j * a_step)], v)
            else:
                for j in range(start, stop):
                    y[np.uint64(y_offset + j)] = value(a[np.uint64(a_offset + j * a_step)], b[np.uint64(b_offset + j * b_step)])

    return named_kernel(name, combine)


def _by_base(a, b):
    return a * 0 if b == 0 else b * power(a, b - type(b)(1))


def _by_exponent(a, b):
    return a * 0 if a == 0 and b >= 0 else power(a, b) * log(a)


COMBINING = {
    POWER: _combining("power", lambda a, b: power(a, b)),
    POWER_BY_BASE: _combining("power_by_base", _by_base),
    POWER_BY_EXPONENT: _combining("power_by_exponent", _by_exponent),
    MAXIMUM: _combining("maximum", lambda a, b: a if a > b or a != a else b),  # NaN if one is
    MINIMUM: _combining("minimum", lambda a, b: a if a < b or a != a else b),
    IS_LARGER: _combining("is_larger", lambda a, b: 1.0 if a > b else 0.5 if a == b else 0.0),
}


def combine(operation: int, y: np.ndarray, a: np.ndarray, b: np.ndarray, sign: float = 1.0) -> None:
    """y = a + sign·b or another operation of `core/strides.py`, with NumPy's broadcasting."""
    steps = strides(y.shape), broadcast_strides(a.shape, y.shape), broadcast_strides(b.shape, y.shape)
    kernel = COMBINING.get(operation, _combine)
    more = () if operation in COMBINING else (operation, sign)
    for loops, starts in nests(y.shape, *steps):
        launch(kernel, bands_for(y.size), y.reshape(-1), a.reshape(-1), b.reshape(-1), loops, *starts, *more)


# ----------------------------------------------------------------------------------------------------------------- sums
@kernel
def _sum_columns(band, bands, y, p, q, product, scale):
    A, P, C = y.shape  # y[a, part, c] = scale·Σ p[a, r, c]·q[a, r, c] over the part-th of P parts of R
    R = p.shape[1]
    factor = p.dtype.type(scale)
    chunks = (C + CHUNK - 1) // CHUNK
    for item in range(band * A * P * chunks // bands, (band + 1) * A * P * chunks // bands):
        a, part, start = item // chunks // P, item // chunks % P, item % chunks * CHUNK
        stop = min(C, start + CHUNK)
        for c in range(start, stop):
            y[a, part, np.uint64(c)] = 0
        for r in range(part * R // P, (part + 1) * R // P):
            if product:
                for c in range(start, stop):
                    y[a, part, np.uint64(c)] += p[a, r, np.uint64(c)] * q[a, r, np.uint64(c)] * factor
            else:
                for c in range(start, stop):
                    y[a, part, np.uint64(c)] += p[a, r, np.uint64(c)] * factor


@kernel
def _sum_rows(band, bands, y, p, q, product, scale):
    A, P = y.shape
    R = p.shape[1]
    number = p.dtype.type
    for item in range(band * A * P // bands, (band + 1) * A * P // bands):
        a, stop = item // P, (item % P + 1) * R // P
        total = number(0)
        for start in range(item % P * R // P, stop, RUN):
            run = number(0)
            if product:
                for r in range(start, min(start + RUN, stop)):
                    run += p[a, np.uint64(r)] * q[a, np.uint64(r)]
            else:
                for r in range(start, min(start + RUN, stop)):
                    run += p[a, np.uint64(r)]
            total += run
        y[a, item % P] = total * number(scale)


def _sum_axis(y: np.ndarray, p: np.ndarray, q: np.ndarray | None, sizes: tuple[int, int, int], scale: float, split: bool = True) -> None:
    """y (A, C) = scale·Σ p, or scale·Σ p·q, over R; p, q (A, R, C). A long sum has two stages, for accuracy and parallelism."""
    A, R, C = sizes
    parts = 1
    if split and C == 1 and A * R > SMALL:
        parts = max(1, PARTS // A)
    elif split and C > 1 and R >= PARTS:
        parts = isqrt(R)
    sums = y if parts == 1 else empty((A, parts, C), y.dtype)
    summing, input_shape, output_shape = (_sum_rows, (A, R), (A, parts)) if C == 1 else (_sum_columns, sizes, (A, parts, C))
    factor = (p if q is None else q).reshape(input_shape)
    last = 1.0 if parts > 1 else scale
    launch(summing, bands_for(p.size), sums.reshape(output_shape), p.reshape(input_shape), factor, q is not None, last)
    if parts > 1:
        _sum_axis(y, sums, None, (A, parts, C), scale, split=False)


def sum_into(y: np.ndarray, p: np.ndarray, q: np.ndarray | None = None, scale: float = 1.0) -> None:
    """y = scale·Σ p, or scale·Σ p·q with q of p's shape, over the axes along which y is broadcast to p."""
    if p.size == 0:
        return fill(y, 0.0)
    if y.dtype == BFLOAT16:
        widened = empty(y.shape, np.float32)
        sum_into(widened, p, q, scale)
        return convert(y, widened)
    sizes, remaining, done = reduction(p.shape, y.shape)
    if done:
        return _sum_axis(y, p, q, sizes, float(scale))
    partial = empty(remaining, y.dtype)
    _sum_axis(partial, p, q, sizes, 1.0)
    return sum_into(y, partial, scale=scale)
