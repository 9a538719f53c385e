"""Operations that move elements or sum them along axes: sum, broadcast, permute, slice, concatenate.

Each is linear, so that its backward is its transpose, with coefficients of 0 and 1 (or `scale`):

    reduce_sum   y = scale·Σ x over axes                dx = scale·dy, repeated along them
    broadcast    y = x repeated to a shape              dx = Σ dy over the axes of repetition
    permute      y[i_order[0], i_order[1], ...] = x[i_0, i_1, ...]        dx = dy in the inverse order
    slice        y[i] = x[start + i·step] an axis       dx[start + i·step] = dy[i], 0 elsewhere
    concatenate  y = a, then b, along an axis           da, db = the two parts of dy

Two kernels do them all. Both see their arrays as flat and the axes as a list of (size, stride in every array), in which axes that every
array steps through as through one are joined; the innermost axis is the loop that vectorises.
"""
from __future__ import annotations

from functools import cache
from math import prod

import numpy as np

from .cpu import kernel, routine, threads
from .device import empty
from .op import Cost, Implementation, Op, Shape, launch

CHUNK = 1024                                            # the longest run of elements that is summed at a time
PARTS = 64                                              # a long sum is split into about this many: fixed, as no result may depend on the threads
SMALL = 16384                                           # elements; less is not worth a second thread or a second launch


# -------------------------------------------------------------------------------------------------------------------- axes
def strides(shape: Shape) -> Shape:
    """The strides, in elements, of a C-contiguous array."""
    return tuple(prod(shape[i + 1:]) for i in range(len(shape)))


def broadcast_strides(shape: Shape, target: Shape) -> Shape:
    """The strides of a C-contiguous array that is broadcast to a shape: 0 where it repeats."""
    shape = (1,) * (len(target) - len(shape)) + shape
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides(shape)))


@cache
def loops_over(shape: Shape, *steps: Shape) -> tuple[np.ndarray, Shape]:
    """The loops over a shape for arrays of these strides: the outer ones as rows (size, stride in each array), and the innermost."""
    loops: list[Shape] = []
    for loop in zip(shape, *steps):
        if loop[0] == 1:
            continue
        if loops and all(outer == loop[0] * inner for outer, inner in zip(loops[-1][1:], loop[1:])):
            loops[-1] = (loops[-1][0] * loop[0], *loop[1:])
        else:
            loops.append(loop)
    loops = loops or [(1,) * (1 + len(steps))]
    return np.array(loops[:-1], np.int64).reshape(-1, 1 + len(steps)), loops[-1]


def bands(size: int) -> int:
    """How many parts an element-wise loop over `size` elements is worth."""
    return threads() if size > SMALL else 1


@routine
def offset(index, loops, array):
    """Where the index-th round of nested loops finds the array of that column: Σ index·stride."""
    position = 0
    for loop in range(len(loops) - 1, -1, -1):
        position += index % loops[loop, 0] * loops[loop, array]
        index //= loops[loop, 0]
    return position


# ---------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _copy(band, bands, y, x, outer, inner, y_step, x_step, y_start, x_start, scale):
    number = y.dtype.type
    size = inner
    for loop in range(len(outer)):
        size *= outer[loop, 0]
    i, stop = band * size // bands, (band + 1) * size // bands
    while i < stop:
        row = i // inner
        column = i - row * inner
        length = min(inner - column, stop - i)
        to = y_start + column * y_step + offset(row, outer, 1)
        at = x_start + column * x_step + offset(row, outer, 2)
        if y_step == 1 and x_step == 1:
            target, source = y[to:to + length], x[at:at + length]
            for j in range(length):
                target[j] = source[j] * number(scale)
        else:
            for j in range(length):                     # unsigned: no test for indices that count from the end
                y[np.uint64(to + j * y_step)] = x[np.uint64(at + j * x_step)] * number(scale)
        i += length


@kernel
def _fill(band, bands, y, value):
    for i in range(band * len(y) // bands, (band + 1) * len(y) // bands):
        y[i] = value


@kernel
def _sum(band, bands, y, p, q, kept, summed, inner, keeps, q_step, parts, product, scale):
    """y[part, kept] = scale·Σ p·q over this part of the rounds of `summed`; columns of the loops: size, stride in y, in p, in q."""
    number = p.dtype.type
    chunks = (inner + CHUNK - 1) // CHUNK
    pieces, rounds = 1, 1
    for loop in range(len(kept)):
        pieces *= kept[loop, 0]
    for loop in range(len(summed)):
        rounds *= summed[loop, 0]
    for item in range(band * pieces * parts // bands, (band + 1) * pieces * parts // bands):
        part, piece = item // pieces, item % pieces
        to, p_at, q_at = offset(piece, kept, 1), offset(piece, kept, 2), offset(piece, kept, 3)
        length = min(inner - piece % chunks * CHUNK, CHUNK) if keeps else 1
        target = y[part, to:to + length]
        for j in range(length):
            target[j] = 0
        for turn in range(part * rounds // parts, (part + 1) * rounds // parts):
            if not keeps:
                length = min(inner - turn % chunks * CHUNK, CHUNK)
            p_start = p_at + offset(turn, summed, 2)
            q_start = q_at + offset(turn, summed, 3) if product else 0
            source = p[p_start:p_start + length]
            if product and q_step == 1:
                factor = q[q_start:q_start + length]
                if keeps:
                    for j in range(length):
                        target[j] += source[j] * factor[j] * number(scale)
                else:
                    total = number(0)
                    for j in range(length):
                        total += source[j] * factor[j]
                    target[0] += total * number(scale)
            else:
                coefficient = q[q_start] * number(scale) if product else number(scale)
                if keeps:
                    for j in range(length):
                        target[j] += source[j] * coefficient
                else:
                    total = number(0)
                    for j in range(length):
                        total += source[j]
                    target[0] += total * coefficient


def copy(y: np.ndarray, x: np.ndarray, shape: Shape, y_strides: Shape, x_strides: Shape, y_start=0, x_start=0, scale=1.0) -> None:
    """y = scale·x over a shape, each array with its own strides and first element."""
    outer, (inner, y_step, x_step) = loops_over(shape, y_strides, x_strides)
    launch(_copy, bands(prod(shape)), y.reshape(-1), x.reshape(-1), outer, inner, y_step, x_step, y_start, x_start, float(scale))


def fill(y: np.ndarray, value: float) -> None:
    """y = value everywhere."""
    launch(_fill, bands(y.size), y.reshape(-1), float(value))


@cache
def _sum_loops(shape: Shape, y: Shape, q: Shape) -> tuple:
    """The arguments of `_sum` from `kept` to `q_step`, and into how many parts this sum is split."""
    outer, (inner, y_step, _, q_step) = loops_over(shape, broadcast_strides(y, shape), strides(shape), broadcast_strides(q, shape))
    chunks = np.array([[-(-inner // CHUNK), CHUNK * y_step, CHUNK, CHUNK * q_step]])
    kept, summed = outer[outer[:, 1] != 0], outer[outer[:, 1] == 0]
    if y_step:
        kept = np.concatenate([kept, chunks])
    else:
        summed = np.concatenate([summed, chunks])
    pieces, rounds = int(kept[:, 0].prod()), int(summed[:, 0].prod())
    parts = 1 if prod(shape) <= SMALL else max(1, min(rounds, PARTS // pieces))
    return kept, summed, inner, y_step != 0, q_step, parts


def sum_into(y: np.ndarray, p: np.ndarray, q: np.ndarray | None = None, scale: float = 1.0, split: bool = True) -> None:
    """y = scale·Σ p, or scale·Σ p·q: the sum over the axes of p along which y is broadcast to it; q is broadcast to p."""
    if p.size == 0:
        return fill(y, 0.0)
    *loops, parts = _sum_loops(p.shape, y.shape, () if q is None else q.shape)
    factor = (p if q is None else q).reshape(-1)
    if parts == 1 or not split:
        launch(_sum, bands(p.size), y.reshape(1, -1), p.reshape(-1), factor, *loops, 1, q is not None, float(scale))
    else:
        sums = empty((parts, y.size), y.dtype)
        launch(_sum, bands(p.size), sums, p.reshape(-1), factor, *loops, parts, q is not None, 1.0)
        sum_into(y.reshape(1, -1), sums, scale=scale, split=False)


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
    cases=[dict(N=3, C=5, shape=(4, 3, 5)), dict(x="N 1 C", N=3, C=7, shape=(2, 3, 5, 7)), dict(x="1", shape=(3,)),
           dict(N=1, C=192, shape=(64, 1, 192))],
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
           dict(x="A B C D E", A=2, B=3, C=4, D=5, E=3, order=(2, 0, 3, 1, 4)), dict(x="N C", N=1, C=1, order=(1, 0)), dict(B=64, N=65, C=192, order=(0, 2, 1))],
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
    cases=[dict(B=2, N=5, C=7, start=(0, 0, 0), stop=(2, 1, 7), step=(1, 1, 1)),
           dict(B=3, N=7, C=5, start=(1, 6, 4), stop=(3, -1, 0), step=(1, -2, -1)),
           dict(x="N", N=9, start=(2,), stop=(9,), step=(3,)),
           dict(B=64, N=65, C=192, start=(0, 1, 0), stop=(64, 65, 192), step=(1, 1, 1))],
    cost=lambda x, start, stop, step: Cost(forward=0),
)


# -------------------------------------------------------------------------------------------------------------- concatenate
def concatenate_reference(y, a, b, axis):
    y[...] = np.concatenate((a, b), axis)


def concatenate_backward_reference(da, db, dy, axis):
    size = dy.shape[axis] - db.shape[axis] if da is None else da.shape[axis]
    for part, gradient in zip(np.split(dy, [size], axis), (da, db)):
        if gradient is not None:
            gradient[...] = part


def concatenate_cpu(y, a, b, axis):
    steps = strides(y.shape)
    copy(y, a, a.shape, steps, strides(a.shape))
    copy(y, b, b.shape, steps, strides(b.shape), y_start=a.shape[axis] * steps[axis])


def concatenate_backward_cpu(da, db, dy, axis):
    steps = strides(dy.shape)
    if da is not None:
        copy(da, dy, da.shape, strides(da.shape), steps)
    if db is not None:
        copy(db, dy, db.shape, strides(db.shape), steps, x_start=(dy.shape[axis] - db.shape[axis]) * steps[axis])


def _concatenated(a: Shape, b: Shape, axis: int) -> Shape:
    axis %= len(a)
    return *a[:axis], a[axis] + b[axis], *a[axis + 1:]


concatenate = Op(
    "concatenate",
    shapes={"a": "B M C", "b": "B N C"},
    constants={"axis": 1},
    outputs=lambda a, b, axis: {"y": _concatenated(a, b, axis)},
    forward=Implementation(concatenate_reference, concatenate_cpu),
    backward=Implementation(concatenate_backward_reference, concatenate_backward_cpu),
    cases=[dict(B=2, M=1, N=5, C=7), dict(a="M N", b="M C", M=3, N=4, C=5, axis=-1), dict(a="M C", b="N C", M=1, N=1, C=1, axis=0),
           dict(B=64, M=1, N=64, C=192)],
    cost=lambda a, b, axis: Cost(forward=0),
)
