"""Elements copied, converted and summed, on either device: what ops that only move numbers are made of, and others in part.

A copy sees its arrays as flat, and the axes as nested loops, each of a size and a step in every array; neighbouring axes that every array
steps through as through one are joined. A sum along neighbouring axes is one over R in (A, R, C). A, C: what precedes and follows R.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from math import isqrt, prod
from typing import Any

import numpy as np

from . import cuda
from .cpu import kernel, preparation, routine, threads
from .cuda import Grid
from .device import BFLOAT16, accumulator, common, empty, is_array, place_of
from .op import Shape, launch

CHUNK = 1024  # elements that are summed side by side
RUN = 128  # elements of a row that are summed before they join the sum of the row
PARTS = 64  # sums that make a long one, whatever the number of threads
SMALL = 16384  # elements; fewer are not worth a second thread
LOOPS = 4  # in a kernel, the innermost among them; more are rare, and become several launches
_source = cuda.Source("copying")


# ------------------------------------------------------------------------------------------------------------------- loops
def strides(shape: Shape) -> Shape:
    """The steps, in elements, of a C-contiguous array along its axes."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def broadcast_strides(shape: Shape, target: Shape) -> Shape:
    """The steps of a C-contiguous array that is broadcast to a shape: 0 where it repeats."""
    shape = (1,) * (len(target) - len(shape)) + shape
    return tuple(0 if size == 1 else step for size, step in zip(shape, strides(shape)))


@cache
def nests(shape: Shape, *steps: Shape) -> list[tuple[np.ndarray, list[int]]]:
    """The loops over a shape for arrays with these steps: rows of (size, step in each array), and where each array starts."""
    loops: list[Shape] = []
    for loop in zip(shape, *steps):
        if loops and all(outer == loop[0] * inner for outer, inner in zip(loops[-1][1:], loop[1:])):
            loops[-1] = (loops[-1][0] * loop[0], *loop[1:])
        elif loop[0] != 1:
            loops.append(loop)
    loops = [(1,) * (1 + len(steps))] * (LOOPS - len(loops)) + loops
    outer, table = loops[:-LOOPS], np.array(loops[-LOOPS:], np.int64)
    rounds = np.ndindex(*(loop[0] for loop in outer))
    return [(table, [sum(i * loop[array] for i, loop in zip(index, outer)) for array in range(1, 1 + len(steps))]) for index in rounds]


@routine
def offset(row, loops, array):
    """How far the array of that column has stepped in the row-th round of the outer loops."""
    inner, row = row % loops[2, 0], row // loops[2, 0]
    return row // loops[1, 0] * loops[0, array] + row % loops[1, 0] * loops[1, array] + inner * loops[2, array]


@routine
def share(band, bands, loops):
    """A band's part: from and to which round of the outer loops, and from and to which element of the inner one."""
    rows, inner = loops[0, 0] * loops[1, 0] * loops[2, 0], loops[3, 0]
    if rows < bands:
        return 0, rows, band * inner // bands, (band + 1) * inner // bands
    return band * rows // bands, (band + 1) * rows // bands, 0, inner


def bands_for(size: int) -> int:
    """Into how many bands an element-wise loop is worth splitting."""
    return threads() if size > SMALL else 1


# --------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _copy(band, bands, y, x, loops, y_start, x_start, scale):
    factor = y.dtype.type(scale)
    first, last, start, stop = share(band, bands, loops)
    y_step, x_step = loops[3, 1], loops[3, 2]
    for row in range(first, last):
        to, at = y_start + offset(row, loops, 1), x_start + offset(row, loops, 2)
        for j in range(start, stop):  # unsigned indices: no test for those that count from the end
            y[np.uint64(to + j * y_step)] = x[np.uint64(at + j * x_step)] * factor


@kernel
def _fill(band, bands, y, value):
    for i in range(band * len(y) // bands, (band + 1) * len(y) // bands):
        y[i] = value


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


def copy(
    y: np.ndarray, x: np.ndarray, shape: Shape, y_steps: Shape, x_steps: Shape, y_start: int = 0, x_start: int = 0, scale: float = 1.0
) -> None:
    """y = scale·x over a shape, each array from its own start and with its own steps."""
    for loops, (to, at) in nests(shape, y_steps, x_steps):
        if place_of(y) == "cuda":
            _copy_cuda(y, x, loops, y_start + to, x_start + at, float(scale))
            continue
        launch(_copy, bands_for(prod(shape)), y.reshape(-1), x.reshape(-1), loops, y_start + to, x_start + at, float(scale))


@preparation
def _convert(band, bands, y, x):
    first, last = band * len(x) // bands, (band + 1) * len(x) // bands
    y, x = y[first:last], x[first:last]
    for i in range(len(x)):
        y[i] = x[i]


def convert(y: np.ndarray, x: np.ndarray) -> None:
    """y = x, of another floating type."""
    if place_of(y) == "cuda":
        width = vector_width(x.size, y, x)
        launch(_source("convert", y.dtype, x.dtype, width, prepares=True), grid_for(x.size // width), y, x, x.size)
        return
    launch(_convert, bands_for(x.size), y.reshape(-1), x.reshape(-1))


def converted(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x as an array of another floating type, or x itself."""
    if x.dtype == dtype:
        return x
    y = empty(x.shape, dtype, place_of(x))
    convert(y, x)
    return y


def in_float32(outputs: int) -> Callable:
    """Decorator of kernels whose sums lie in their outputs, the first `outputs` arguments: bfloat16 arrays are float32 inside."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(*arguments):
            if not any(is_array(a) and a.dtype == BFLOAT16 for a in arguments):
                return function(*arguments)
            given = [
                a
                if not is_array(a) or a.dtype != BFLOAT16
                else empty(a.shape, np.float32, place_of(a))
                if i < outputs
                else converted(a, np.dtype(np.float32))
                for i, a in enumerate(arguments)
            ]
            function(*given)
            for array, wide in zip(arguments[:outputs], given):
                if wide is not array:
                    convert(array, wide)
            return None

        return run

    return decorate


def fill(y: np.ndarray, value: float) -> None:
    """y = value everywhere."""
    if place_of(y) == "cuda":
        width = vector_width(y.size, y)
        launch(_source("fill", y.dtype, width), grid_for(y.size // width), y, y.size, float(value))
        return
    launch(_fill, bands_for(y.size), y.reshape(-1), float(value))


def _sum_axis(y: Any, p: Any, q: Any, sizes: Shape, scale: float, split: bool = True) -> None:
    """y (A, C) = scale·Σ p, or scale·Σ p·q, over R; p, q (A, R, C). A long sum is one of sums, for accuracy and for the threads."""
    A, R, C = sizes
    on_gpu = place_of(y) == "cuda"
    parts = 1
    if split and on_gpu:
        parts = _parts_cuda(sizes)
    elif split and C == 1 and A * R > SMALL:
        parts = max(1, PARTS // A)
    elif split and C > 1 and R >= PARTS:
        parts = isqrt(R)
    sums = y
    if parts > 1:
        sums = empty((A, parts, C), accumulator(common([p.dtype, y.dtype])) if on_gpu else y.dtype, place_of(y))
    (_sum_cuda if on_gpu else _sum_cpu)(sums, p, q, sizes, parts, 1.0 if parts > 1 else scale)
    if parts > 1:
        _sum_axis(y, sums, None, (A, parts, C), scale, split=False)


def _sum_cpu(sums: np.ndarray, p: np.ndarray, q: np.ndarray | None, sizes: Shape, parts: int, scale: float) -> None:
    A, R, C = sizes
    kernel, before, after = (_sum_rows, (A, R), (A, parts)) if C == 1 else (_sum_columns, sizes, (A, parts, C))
    factor = (p if q is None else q).reshape(before)
    launch(kernel, bands_for(p.size), sums.reshape(after), p.reshape(before), factor, q is not None, scale)


def sum_into(y: np.ndarray, p: np.ndarray, q: np.ndarray | None = None, scale: float = 1.0) -> None:
    """y = scale·Σ p, or scale·Σ p·q with q of p's shape, over the axes along which y is broadcast to p; all on one device."""
    if p.size == 0:
        return fill(y, 0.0)
    if y.dtype == BFLOAT16:
        wide = empty(y.shape, np.float32, place_of(y))
        sum_into(wide, p, q, scale)
        return convert(y, wide)
    kept = (1,) * (p.ndim - y.ndim) + y.shape
    stop = p.ndim  # the last axis of size > 1 that is summed, and those before it that are too
    while stop and kept[stop - 1] == p.shape[stop - 1]:
        stop -= 1
    start = stop
    while start and kept[start - 1] == 1:
        start -= 1
    sizes = prod(p.shape[:start]), prod(p.shape[start:stop]), prod(p.shape[stop:])
    rest = p.shape[:start] + (1,) * (stop - start) + p.shape[stop:]
    if rest == kept:
        _sum_axis(y, p, q, sizes, float(scale))
    else:
        partial = empty(rest, y.dtype, place_of(y))
        _sum_axis(partial, p, q, sizes, 1.0)
        sum_into(y, partial, scale=scale)


# -------------------------------------------------------------------------------------------------------------------- CUDA
THREADS = 256  # of a block
TILE = 32  # rows and columns that a block transposes; vectors side by side that it sums


def vector_width(length: int, *arrays: Any) -> int:
    """How many neighbours may be read at once from each array: at most 16 bytes, of runs of `length` elements, and aligned."""
    width = min((16 // a.itemsize for a in arrays), default=1)
    while length % width or any(cuda.runtime().root(a)[1] % (width * a.itemsize) for a in arrays):
        width //= 2
    return width


def grid_for(threads: int) -> Grid:
    """Blocks for so many threads, or fewer that stride over the rest."""
    return Grid(cuda.blocks_for(threads, THREADS), THREADS)


def rounds(loops: np.ndarray, width: int) -> list[int]:
    """The sizes of the loops but the outermost, the inner one's in vectors, and how many vectors there are in all."""
    sizes = [*loops[:3, 0].tolist(), int(loops[3, 0]) // width]
    if prod(sizes) >= 2**32:
        raise ValueError(f"an array of {prod(sizes) * width} elements is too large for a CUDA kernel")
    return [*sizes[1:], prod(sizes)]


def loop_width(loops: np.ndarray, starts: tuple[int, ...], *arrays: Any) -> int:
    """The vector width of a nest of loops, where the inner one steps through each array by 1, or stands still."""
    if any(step not in (0, 1) for step in loops[3, 1:]) or not loops[3, 1]:
        return 1
    lengths = [int(loops[3, 0])]
    for array, step in enumerate(loops[3, 1:].tolist()):
        if step:
            lengths += [starts[array], *(row[1 + array] for row in loops[:3].tolist() if row[0] > 1)]  # one round takes no step
    width = vector_width(0, *(a for a, step in zip(arrays, loops[3, 1:]) if step))
    while any(length % width for length in lengths):
        width //= 2
    return min(width, *(16 // a.itemsize for a in arrays))


def _copy_cuda(y: Any, x: Any, loops: np.ndarray, to: int, at: int, scale: float) -> None:
    """One nest of loops, (size, step of y, step of x) in each row."""
    across = next((i for i in range(3) if loops[i, 2] == 1 and min(loops[i, 0], loops[3, 0]) >= TILE // 4), None)
    if across is not None and loops[3, 1] == 1 and loops[3, 2] > 1:  # neighbours in y are far apart in x, and the other way around
        (J, y_step, _), (columns, _, x_step) = loops[across].tolist(), loops[3].tolist()
        (A, y_a, x_a), (B, y_b, x_b) = (loops[i].tolist() for i in range(3) if i != across)
        blocks = A * B * -(-columns // TILE) * -(-J // TILE)
        launch(
            _source("transpose", y.dtype, x.dtype),
            Grid(blocks, THREADS),
            y,
            x,
            columns,
            J,
            y_step,
            x_step,
            B,
            y_a,
            y_b,
            x_a,
            x_b,
            to,
            at,
            scale,
        )
        return
    width = loop_width(loops, (to, at), y, x)
    sizes = rounds(loops, width)
    repeats = width > 1 and loops[3, 2] == 0
    launch(
        _source("copy", y.dtype, x.dtype, width, repeats, scale != 1.0),
        grid_for(sizes[-1]),
        y,
        x,
        *sizes,
        *loops[:, 1].tolist(),
        *loops[:, 2].tolist(),
        to,
        at,
        scale,
    )


def _parts_cuda(sizes: Shape) -> int:
    """Into how many parts a sum is cut, so that all multiprocessors have some."""
    A, R, C = sizes
    if C == 1:
        return max(1, min(cuda.runtime().processors * 32 // A, R // 2048))
    return max(1, min(cuda.runtime().processors * 4 // (A * -(-C // 128)), R // 64))


def _sum_cuda(sums: Any, p: Any, q: Any, sizes: Shape, parts: int, scale: float) -> None:
    A, R, C = sizes
    read = [p] if q is None else [p, q]
    width = vector_width(R if C == 1 else C, *read)
    types = sums.dtype, p.dtype, (p if q is None else q).dtype, width
    if C == 1:
        grid = Grid(cuda.blocks_for(A * parts * 32, THREADS, most=32), THREADS)
        launch(_source("sum_rows", *types), grid, sums, p, q, A * parts, R, parts, scale)
    else:
        blocks = A * parts * -(-C // (width * TILE))
        launch(_source("sum_columns", *types), Grid(blocks, THREADS), sums, p, q, R, C, parts, scale)
