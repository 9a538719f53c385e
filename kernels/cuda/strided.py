"""Copies, conversions, element-wise arithmetic and sums on a GPU; `cpu/strided.py` describes the functions of the same names.

All use vector loads where lengths, strides and alignment allow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ...errors import UserError
from ..core.arrays import empty
from ..core.devices import runtime
from ..core.dtypes import BFLOAT16, accumulator_dtype, result_dtype
from ..core.op import Shape
from ..core.recording import launch
from ..core.strides import DIVIDE, broadcast_strides, nests, reduction, strides
from .kernel import TYPES, Grid, Source, blocks_for

THREADS = 256  # per block
TILE = 32  # rows and columns of a transposed tile; adjacent vectors of columns that a block sums
_source = Source("cuda/strided")


# ------------------------------------------------------------------------------------------------------ grids and vectors
def vector_width(length: int, *arrays: Any) -> int:
    """The vector width, in elements, usable in each array: at most 16 bytes, aligned, and a divisor of `length`."""
    width = min((16 // a.itemsize for a in arrays), default=1)
    while length % width or any(runtime().address(a) % (width * a.itemsize) for a in arrays):
        width //= 2
    return width


def grid_for(threads: int) -> Grid:
    """The grid for a grid-stride loop over `threads` items."""
    return Grid(blocks_for(threads, THREADS), THREADS)


def rounds(loops: np.ndarray, width: int) -> list[int]:
    """The sizes of all loops but the outermost, the innermost in vectors, and the total number of vectors."""
    sizes = [*loops[:3, 0].tolist(), int(loops[3, 0]) // width]
    if prod(sizes) >= 2**32:
        raise ValueError(f"an array of {prod(sizes) * width} elements is too large for a CUDA kernel")
    return [*sizes[1:], prod(sizes)]


def loop_width(loops: np.ndarray, starts: tuple[int, ...], *arrays: Any) -> int:
    """The vector width for a loop nest; more than 1 only if the innermost stride is 1 in y, and 1 or 0 in the other arrays."""
    if any(step not in (0, 1) for step in loops[3, 1:]) or not loops[3, 1]:
        return 1
    lengths = [int(loops[3, 0])]
    for array, step in enumerate(loops[3, 1:].tolist()):
        if step:
            lengths += [
                starts[array],
                *(row[1 + array] for row in loops[:3].tolist() if row[0] > 1),
            ]  # strides of loops of size 1 do not matter
    width = vector_width(0, *(a for a, step in zip(arrays, loops[3, 1:]) if step))
    while any(length % width for length in lengths):
        width //= 2
    return min(width, *(16 // a.itemsize for a in arrays))


# --------------------------------------------------------------------------------------------------------------- copies
def copy(y: Any, x: Any, shape: Shape, y_steps: Shape, x_steps: Shape, y_start: int = 0, x_start: int = 0, scale: float = 1.0) -> None:
    """y = scale·x over a shape, with a start and strides (in elements) for each array."""
    for loops, (y_offset, x_offset) in nests(shape, y_steps, x_steps):
        _copy_loops(y, x, loops, y_start + y_offset, x_start + x_offset, float(scale))


def _copy_loops(y: Any, x: Any, loops: np.ndarray, y_offset: int, x_offset: int, scale: float) -> None:
    """Copy one loop nest, with (size, stride of y, stride of x) in each row of `loops`."""
    across = next((i for i in range(3) if loops[i, 2] == 1 and min(loops[i, 0], loops[3, 0]) >= TILE // 4), None)
    if across is not None and loops[3, 1] == 1 and loops[3, 2] > 1:  # a transpose: y is contiguous along one loop, x along another
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
            y_offset,
            x_offset,
            scale,
        )
        return
    width = loop_width(loops, (y_offset, x_offset), y, x)
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
        y_offset,
        x_offset,
        scale,
    )


def fill(y: Any, value: float) -> None:
    """Set all elements of y to value."""
    width = vector_width(y.size, y)
    launch(_source("fill", y.dtype, width), grid_for(y.size // width), y, y.size, float(value))


def convert(y: Any, x: Any) -> None:
    """y = x, converted to the floating-point type of y."""
    width = vector_width(x.size, y, x)
    launch(_source("convert", y.dtype, x.dtype, width, prepares=True), grid_for(x.size // width), y, x, x.size)


def take(y: Any, x: Any) -> None:
    """y = x, an array of any library on this GPU with y's shape, any strides and a type of its own. Raises UserError for types."""
    with runtime().borrowed(x) as (values, steps):
        _take(y, values, steps)


def contiguous(x: Any) -> Any:
    """A C-contiguous copy, of the same type, of an array of any library on this GPU. Raises UserError for types."""
    with runtime().borrowed(x) as (values, steps):
        y = empty(tuple(values.shape), values.dtype, "cuda")
        _take(y, values, steps)
    return y


def _take(y: Any, x: Any, steps: Sequence[int]) -> None:
    """y = x, with strides in bytes."""
    if x.dtype.name not in TYPES:
        raise UserError(f"an array on the GPU has the type {x.dtype}: convert it to one of {', '.join(TYPES)}")
    if y.dtype.kind in "iu" and x.dtype.kind not in "iu":
        raise UserError(f"labels must be integers, or rows of probabilities, got {x.dtype} of shape {tuple(x.shape)}")
    if any(step % x.itemsize for step in steps):
        raise UserError(f"an array on the GPU has strides of {tuple(steps)} bytes, no multiples of its {x.itemsize}: copy it first")
    if y.size:
        copy(y, x, tuple(y.shape), strides(y.shape), tuple(step // x.itemsize for step in steps))


def astype(x: Any, dtype: np.dtype) -> Any:
    """x converted to a floating-point type; x itself if it has that type."""
    if x.dtype == dtype:
        return x
    y = empty(x.shape, dtype, "cuda")
    convert(y, x)
    return y


# ----------------------------------------------------------------------------------------------------------- arithmetic
def combine(operation: int, y: Any, a: Any, b: Any, sign: float = 1.0) -> None:
    """y = a + sign·b or another operation of `core/strides.py`, with NumPy's broadcasting."""
    steps = strides(y.shape), broadcast_strides(a.shape, y.shape), broadcast_strides(b.shape, y.shape)
    for loops, starts in nests(y.shape, *steps):
        width = loop_width(loops, tuple(starts), y, a, b)
        sizes = rounds(loops, width)
        repeats = [width > 1 and loops[3, i] == 0 for i in (2, 3)]
        kernel = _source("combine", y.dtype, a.dtype, b.dtype, width, *repeats, operation > DIVIDE)
        launch(kernel, grid_for(sizes[-1]), y, a, b, *sizes, *loops[:, 1:].T.reshape(-1).tolist(), *starts, operation, sign)


# ----------------------------------------------------------------------------------------------------------------- sums
def _parts(sizes: Shape) -> int:
    """The number of parts of a sum, so that all multiprocessors have work."""
    A, R, C = sizes
    if C == 1:
        return max(1, min(runtime().multiprocessors * 32 // A, R // 2048))
    return max(1, min(runtime().multiprocessors * 4 // (A * -(-C // 128)), R // 64))


def _launch_sum(sums: Any, p: Any, q: Any, sizes: Shape, parts: int, scale: float) -> None:
    A, R, C = sizes
    operands = [p] if q is None else [p, q]
    width = vector_width(R if C == 1 else C, *operands)
    types = sums.dtype, p.dtype, (p if q is None else q).dtype, width, q is not None
    if C == 1:
        grid = Grid(blocks_for(A * parts * 32, THREADS, most=32), THREADS)
        launch(_source("sum_rows", *types), grid, sums, p, q, A * parts, R, parts, scale)
    else:
        blocks = A * parts * -(-C // (width * TILE))
        launch(_source("sum_columns", *types), Grid(blocks, THREADS), sums, p, q, R, C, parts, scale)


def _sum_axis(y: Any, p: Any, q: Any, sizes: tuple[int, int, int], scale: float, split: bool = True) -> None:
    """y (A, C) = scale·Σ p, or scale·Σ p·q, over R; p, q (A, R, C). A long sum has two stages, so that all multiprocessors have work."""
    A, _, C = sizes
    parts = _parts(sizes) if split else 1
    sums = y if parts == 1 else empty((A, parts, C), accumulator_dtype(result_dtype([p.dtype, y.dtype])), "cuda")
    _launch_sum(sums, p, q, sizes, parts, 1.0 if parts > 1 else scale)
    if parts > 1:
        _sum_axis(y, sums, None, (A, parts, C), scale, split=False)


def sum_into(y: Any, p: Any, q: Any = None, scale: float = 1.0) -> None:
    """y = scale·Σ p, or scale·Σ p·q with q of p's shape, over the axes along which y is broadcast to p."""
    if p.size == 0:
        return fill(y, 0.0)
    if y.size == p.size and q is None:  # nothing is summed
        return copy(y, p, (y.size,), (1,), (1,), scale=scale)
    if y.dtype == BFLOAT16:
        widened = empty(y.shape, np.float32, "cuda")
        sum_into(widened, p, q, scale)
        return convert(y, widened)
    sizes, remaining, done = reduction(p.shape, y.shape)
    if done:
        return _sum_axis(y, p, q, sizes, float(scale))
    partial = empty(remaining, y.dtype, "cuda")
    _sum_axis(partial, p, q, sizes, 1.0)
    return sum_into(y, partial, scale=scale)
