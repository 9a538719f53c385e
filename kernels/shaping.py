"""Operations that move elements or sum them along axes: sum, broadcast, permute, slice.

Each is linear, so that its backward is its transpose, with coefficients of 0 and 1 (or `scale`):

    reduce_sum   y = scale·Σ x over axes                dx = scale·dy, repeated along them
    broadcast    y = x repeated to a shape              dx = Σ dy over the axes of repetition
    permute      y[i_order[0], i_order[1], ...] = x[i_0, i_1, ...]        dx = dy in the inverse order
    slice        y[i] = x[start + i·step] an axis       dx[start + i·step] = dy[i], 0 elsewhere

A copy sees its arrays as flat, and the axes as nested loops, each of a size and a step in every array; neighbouring axes that every array
steps through as through one are joined. A sum along neighbouring axes is one over R in (A, R, C). A, C: what precedes and follows R.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from math import isqrt, prod

import numpy as np

from .cpu import kernel, preparation, routine, threads
from .device import BFLOAT16, empty
from .op import Cost, Implementation, Op, Shape, launch

CHUNK = 1024                                            # elements that are summed side by side
RUN = 128                                               # elements of a row that are summed before they join the sum of the row
PARTS = 64                                              # sums that make a long one, whatever the number of threads
SMALL = 16384                                           # elements; fewer are not worth a second thread
LOOPS = 4                                               # in a kernel, the innermost among them; more are rare, and become several launches


# ------------------------------------------------------------------------------------------------------------------- loops
def strides(shape: Shape) -> Shape:
    """The steps, in elements, of a C-contiguous array along its axes."""
    return tuple(prod(shape[i + 1:]) for i in range(len(shape)))


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
        for j in range(start, stop):                    # unsigned indices: no test for those that count from the end
            y[np.uint64(to + j * y_step)] = x[np.uint64(at + j * x_step)] * factor


@kernel
def _fill(band, bands, y, value):
    for i in range(band * len(y) // bands, (band + 1) * len(y) // bands):
        y[i] = value


@kernel
def _sum_columns(band, bands, y, p, q, product, scale):
    A, P, C = y.shape                                   # y[a, part, c] = scale·Σ p[a, r, c]·q[a, r, c] over the part-th of P parts of R
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


def copy(y: np.ndarray, x: np.ndarray, shape: Shape, y_steps: Shape, x_steps: Shape, y_start: int = 0, x_start: int = 0,
         scale: float = 1.0) -> None:
    """y = scale·x over a shape, each array from its own start and with its own steps."""
    for loops, (to, at) in nests(shape, y_steps, x_steps):
        launch(_copy, bands_for(prod(shape)), y.reshape(-1), x.reshape(-1), loops, y_start + to, x_start + at, float(scale))


@preparation
def _convert(band, bands, y, x):
    first, last = band * len(x) // bands, (band + 1) * len(x) // bands
    y, x = y[first:last], x[first:last]
    for i in range(len(x)):
        y[i] = x[i]


def convert(y: np.ndarray, x: np.ndarray) -> None:
    """y = x, of another floating type."""
    launch(_convert, bands_for(x.size), y.reshape(-1), x.reshape(-1))


def converted(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x as an array of another floating type, or x itself."""
    if x.dtype == dtype:
        return x
    y = empty(x.shape, dtype)
    convert(y, x)
    return y


def in_float32(outputs: int) -> Callable:
    """Decorator of kernels whose sums lie in their outputs, the first `outputs` arguments: bfloat16 arrays are float32 inside."""
    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(*arguments):
            if not any(isinstance(a, np.ndarray) and a.dtype == BFLOAT16 for a in arguments):
                return function(*arguments)
            given = [a if not isinstance(a, np.ndarray) or a.dtype != BFLOAT16 else
                     empty(a.shape, np.float32) if i < outputs else converted(a, np.dtype(np.float32)) for i, a in enumerate(arguments)]
            function(*given)
            for array, wide in zip(arguments[:outputs], given):
                if wide is not array:
                    convert(array, wide)
            return None

        return run

    return decorate


def fill(y: np.ndarray, value: float) -> None:
    """y = value everywhere."""
    launch(_fill, bands_for(y.size), y.reshape(-1), float(value))


def _sum_axis(y: np.ndarray, p: np.ndarray, q: np.ndarray | None, sizes: Shape, scale: float, split: bool = True) -> None:
    """y (A, C) = scale·Σ p, or scale·Σ p·q, over R; p, q (A, R, C). A long sum is one of sums, for accuracy and for the threads."""
    A, R, C = sizes
    parts = 1
    if split and C == 1 and A * R > SMALL:
        parts = max(1, PARTS // A)
    elif split and C > 1 and R >= PARTS:
        parts = isqrt(R)
    sums = empty((A, parts, C), y.dtype) if parts > 1 else y
    kernel, before, after = (_sum_rows, (A, R), (A, parts)) if C == 1 else (_sum_columns, sizes, (A, parts, C))
    factor = (p if q is None else q).reshape(before)
    launch(kernel, bands_for(p.size), sums.reshape(after), p.reshape(before), factor, q is not None, 1.0 if parts > 1 else scale)
    if parts > 1:
        _sum_axis(y, sums, None, (A, parts, C), scale, split=False)


def sum_into(y: np.ndarray, p: np.ndarray, q: np.ndarray | None = None, scale: float = 1.0) -> None:
    """y = scale·Σ p, or scale·Σ p·q with q of p's shape, over the axes along which y is broadcast to p."""
    if p.size == 0:
        return fill(y, 0.0)
    if y.dtype == BFLOAT16:
        wide = empty(y.shape, np.float32)
        sum_into(wide, p, q, scale)
        return convert(y, wide)
    kept = (1,) * (p.ndim - y.ndim) + y.shape
    stop = p.ndim                                       # the last axis of size > 1 that is summed, and those before it that are too
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
        partial = empty(rest, y.dtype)
        _sum_axis(partial, p, q, sizes, 1.0)
        sum_into(y, partial, scale=scale)


def column_sums(y: np.ndarray, x: np.ndarray) -> None:
    """y (C,) = the sums of the columns of x (R, C)."""
    sum_into(y, x)


column_sums_cuda = column_sums


# --------------------------------------------------------------------------------------------------------------- reduce_sum
def _summed(shape: Shape, axes: Shape | None) -> Shape:
    return tuple(range(len(shape))) if axes is None else tuple(axis % len(shape) for axis in axes)


def _kept_shape(shape: Shape, axes: Shape | None) -> Shape:
    """The shape of a sum over these axes (None: all) that keeps them with size 1."""
    return tuple(1 if i in _summed(shape, axes) else size for i, size in enumerate(shape))


def _sum_shape(shape: Shape, axes: Shape | None, keepdims: bool) -> Shape:
    return _kept_shape(shape, axes) if keepdims else tuple(size for i, size in enumerate(shape) if i not in _summed(shape, axes))


def reduce_sum_reference(y, x, axes, keepdims, scale):
    y[...] = scale * x.sum(axes, keepdims=keepdims)


def reduce_sum_backward_reference(dx, dy, axes, keepdims, scale):
    dx[...] = scale * dy.reshape(_kept_shape(dx.shape, axes))


def reduce_sum_cpu(y, x, axes, keepdims, scale):
    sum_into(y.reshape(_kept_shape(x.shape, axes)), x, scale=scale)


def reduce_sum_backward_cpu(dx, dy, axes, keepdims, scale):
    copy(dx, dy, dx.shape, strides(dx.shape), broadcast_strides(_kept_shape(dx.shape, axes), dx.shape), scale=scale)


reduce_sum = Op(
    "reduce_sum",
    shapes={"x": "B N C"},
    constants={"axes": None, "keepdims": False, "scale": 1.0},                  # a mean has scale 1/n
    outputs=lambda x, axes, keepdims, scale: {"y": _sum_shape(x, axes, keepdims)},
    forward=Implementation(reduce_sum_reference, reduce_sum_cpu),
    backward=Implementation(reduce_sum_backward_reference, reduce_sum_backward_cpu),
    cases=[dict(B=2, N=5, C=7, axes=(1,), scale=0.2), dict(B=3, N=5, C=7), dict(B=3, N=5, C=7, axes=(-1,), keepdims=True),
           dict(B=3, N=4, C=5, axes=(0, 2)), dict(B=5, N=7, C=1, axes=()), dict(x="C", C=70_001), dict(x="B N", B=4160, N=33, axes=(0,)),
           dict(x="B N", B=3, N=20_011, axes=(1,)), dict(B=64, N=65, C=192, axes=(1,), scale=1 / 65), dict(B=64, N=65, C=192, axes=(0,))],
    cost=lambda x, axes, keepdims, scale: Cost(forward=prod(x), backward=prod(x)),
)


# ---------------------------------------------------------------------------------------------------------------- broadcast
def broadcast_reference(y, x, shape):
    y[...] = x


def broadcast_backward_reference(dx, dy, shape):
    added = dy.ndim - dx.ndim
    repeated = tuple(i for i, size in enumerate((1,) * added + dx.shape) if size == 1)
    dx[...] = dy.sum(repeated, keepdims=True).reshape(dx.shape)


def broadcast_cpu(y, x, shape):
    copy(y, x, y.shape, strides(y.shape), broadcast_strides(x.shape, y.shape))


def broadcast_backward_cpu(dx, dy, shape):
    sum_into(dx, dy)


broadcast = Op(
    "broadcast",
    shapes={"x": "1 N C"},
    constants={"shape": ()},
    outputs=lambda x, shape: {"y": np.broadcast_shapes(x, shape)},
    forward=Implementation(broadcast_reference, broadcast_cpu),
    backward=Implementation(broadcast_backward_reference, broadcast_backward_cpu),
    cases=[dict(B=4, N=3, C=5, shape=lambda s: (s["B"], s["N"], s["C"])), dict(x="", N=3, shape=lambda s: (s["N"],)),
           dict(x="N 1 C", B=2, M=5, N=3, C=7, shape=lambda s: (s["B"], s["N"], s["M"], s["C"])),
           dict(B=64, N=1, C=192, shape=lambda s: (s["B"], s["N"], s["C"]))],
    cost=lambda x, shape: Cost(forward=0, backward=prod(shape)),
)


# ------------------------------------------------------------------------------------------------------------------ permute
def permute_reference(y, x, order):
    y[...] = x.transpose(order)


def permute_backward_reference(dx, dy, order):
    dx.transpose(order)[...] = dy


def permute_cpu(y, x, order):
    source = strides(x.shape)
    copy(y, x, y.shape, strides(y.shape), tuple(source[axis] for axis in order))


def permute_backward_cpu(dx, dy, order):
    permute_cpu(dx, dy, tuple(int(axis) for axis in np.argsort(np.array(order) % dx.ndim)))


permute = Op(
    "permute",
    shapes={"x": "B N C"},
    constants={"order": ()},
    outputs=lambda x, order: {"y": tuple(x[axis] for axis in order)},
    forward=Implementation(permute_reference, permute_cpu),
    backward=Implementation(permute_backward_reference, permute_backward_cpu),
    cases=[dict(B=2, N=3, C=5, order=(0, 2, 1)), dict(B=2, N=3, C=5, order=(1, 0, -1)),
           dict(x="A B C D E", A=2, B=3, C=4, D=5, E=3, order=(4, 2, 0, 3, 1)), dict(x="N C", N=1, C=1, order=(1, 0)),
           dict(B=64, N=65, C=192, order=(0, 2, 1))],
    cost=lambda x, order: Cost(forward=0),
)


# -------------------------------------------------------------------------------------------------------------------- slice
def _picked(start: Shape, stop: Shape, step: Shape) -> list[range]:
    return [range(*bounds) for bounds in zip(start, stop, step)]


def slice_reference(y, x, start, stop, step):
    y[...] = x[np.ix_(*_picked(start, stop, step))]


def slice_backward_reference(dx, dy, start, stop, step):
    dx[...] = 0
    dx[np.ix_(*_picked(start, stop, step))] = dy


def _window(shape: Shape, start: Shape, step: Shape) -> tuple[Shape, int]:
    """The strides and the first element of a slice."""
    steps = strides(shape)
    return tuple(a * b for a, b in zip(step, steps)), sum(a * b for a, b in zip(start, steps))


def slice_cpu(y, x, start, stop, step):
    steps, first = _window(x.shape, start, step)
    copy(y, x, y.shape, strides(y.shape), steps, x_start=first)


def slice_backward_cpu(dx, dy, start, stop, step):
    steps, first = _window(dx.shape, start, step)
    if dy.size < dx.size:
        fill(dx, 0.0)
    copy(dx, dy, dy.shape, steps, strides(dy.shape), y_start=first)


slicing = Op(
    "slice",
    shapes={"x": "B N C"},
    constants={"start": (), "stop": (), "step": ()},    # an entry an axis, as range() takes them: from slice.indices(size)
    outputs=lambda x, start, stop, step: {"y": tuple(len(r) for r in _picked(start, stop, step))},
    forward=Implementation(slice_reference, slice_cpu),
    backward=Implementation(slice_backward_reference, slice_backward_cpu),
    cases=[dict(B=2, N=5, C=7, start=(0, 0, 0), stop=lambda s: (s["B"], 1, s["C"]), step=(1, 1, 1)),
           dict(B=3, N=7, C=5, start=lambda s: (s["B"] // 2, s["N"] - 1, s["C"] - 1), stop=lambda s: (s["B"], -1, -1), step=(1, -2, -1)),
           dict(x="N", N=9, start=lambda s: (s["N"] // 4,), stop=lambda s: (s["N"],), step=(3,)),
           dict(B=64, N=65, C=192, start=lambda s: (0, min(1, s["N"] - 1), 0), stop=lambda s: (s["B"], s["N"], s["C"]), step=(1, 1, 1))],
    cost=lambda x, start, stop, step: Cost(forward=0),
)
