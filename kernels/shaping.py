"""Operations that move elements or sum them along axes: sum, broadcast, permute, slice.

Each is linear, so that its backward is its transpose, with coefficients of 0 and 1 (or `scale`):

    reduce_sum   y = scale·Σ x over axes                dx = scale·dy, repeated along them
    broadcast    y = x repeated to a shape              dx = Σ dy over the axes of repetition
    permute      y[i_order[0], i_order[1], ...] = x[i_0, i_1, ...]        dx = dy in the inverse order
    slice        y[i] = x[start + i·step] an axis       dx[start + i·step] = dy[i], 0 elsewhere

Their kernels are those of `copying.py`, on either device.
"""

from __future__ import annotations

from math import prod

import numpy as np

from .copying import broadcast_strides, copy, fill, strides, sum_into
from .op import Cost, Implementation, Op, Shape


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


def reduce_sum_kernels(y, x, axes, keepdims, scale):
    sum_into(y.reshape(_kept_shape(x.shape, axes)), x, scale=scale)


def reduce_sum_backward_kernels(dx, dy, axes, keepdims, scale):
    copy(dx, dy, dx.shape, strides(dx.shape), broadcast_strides(_kept_shape(dx.shape, axes), dx.shape), scale=scale)


reduce_sum = Op(
    "reduce_sum",
    shapes={"x": "B N C"},
    constants={"axes": None, "keepdims": False, "scale": 1.0},  # a mean has scale 1/n
    outputs=lambda x, axes, keepdims, scale: {"y": _sum_shape(x, axes, keepdims)},
    forward=Implementation(reduce_sum_reference, reduce_sum_kernels, reduce_sum_kernels),
    backward=Implementation(reduce_sum_backward_reference, reduce_sum_backward_kernels, reduce_sum_backward_kernels),
    cases=[
        dict(B=2, N=5, C=7, axes=(1,), scale=0.2),
        dict(B=3, N=5, C=7),
        dict(B=3, N=5, C=7, axes=(-1,), keepdims=True),
        dict(B=3, N=4, C=5, axes=(0, 2)),
        dict(B=5, N=7, C=1, axes=()),
        dict(x="C", C=70_001),
        dict(x="B N", B=4160, N=33, axes=(0,)),
        dict(x="B N", B=3, N=20_011, axes=(1,)),
        dict(B=64, N=65, C=192, axes=(1,), scale=1 / 65),
        dict(B=64, N=65, C=192, axes=(0,)),
    ],
    cost=lambda x, axes, keepdims, scale: Cost(forward=prod(x), backward=prod(x)),
)


# ---------------------------------------------------------------------------------------------------------------- broadcast
def broadcast_reference(y, x, shape):
    y[...] = x


def broadcast_backward_reference(dx, dy, shape):
    added = dy.ndim - dx.ndim
    repeated = tuple(i for i, size in enumerate((1,) * added + dx.shape) if size == 1)
    dx[...] = dy.sum(repeated, keepdims=True).reshape(dx.shape)


def broadcast_kernels(y, x, shape):
    copy(y, x, y.shape, strides(y.shape), broadcast_strides(x.shape, y.shape))


def broadcast_backward_kernels(dx, dy, shape):
    sum_into(dx, dy)


broadcast = Op(
    "broadcast",
    shapes={"x": "1 N C"},
    constants={"shape": ()},
    outputs=lambda x, shape: {"y": np.broadcast_shapes(x, shape)},
    forward=Implementation(broadcast_reference, broadcast_kernels, broadcast_kernels),
    backward=Implementation(broadcast_backward_reference, broadcast_backward_kernels, broadcast_backward_kernels),
    cases=[
        dict(B=4, N=3, C=5, shape=lambda s: (s["B"], s["N"], s["C"])),
        dict(x="", N=3, shape=lambda s: (s["N"],)),
        dict(x="N 1 C", B=2, M=5, N=3, C=7, shape=lambda s: (s["B"], s["N"], s["M"], s["C"])),
        dict(B=64, N=1, C=192, shape=lambda s: (s["B"], s["N"], s["C"])),
    ],
    cost=lambda x, shape: Cost(forward=0, backward=prod(shape)),
)


# ------------------------------------------------------------------------------------------------------------------ permute
def permute_reference(y, x, order):
    y[...] = x.transpose(order)


def permute_backward_reference(dx, dy, order):
    dx.transpose(order)[...] = dy


def permute_kernels(y, x, order):
    source = strides(x.shape)
    copy(y, x, y.shape, strides(y.shape), tuple(source[axis] for axis in order))


def permute_backward_kernels(dx, dy, order):
    permute_kernels(dx, dy, tuple(int(axis) for axis in np.argsort(np.array(order) % dx.ndim)))


permute = Op(
    "permute",
    shapes={"x": "B N C"},
    constants={"order": ()},
    outputs=lambda x, order: {"y": tuple(x[axis] for axis in order)},
    forward=Implementation(permute_reference, permute_kernels, permute_kernels),
    backward=Implementation(permute_backward_reference, permute_backward_kernels, permute_backward_kernels),
    cases=[
        dict(B=2, N=3, C=5, order=(0, 2, 1)),
        dict(B=2, N=3, C=5, order=(1, 0, -1)),
        dict(x="A B C D E", A=2, B=3, C=4, D=5, E=3, order=(4, 2, 0, 3, 1)),
        dict(x="N C", N=1, C=1, order=(1, 0)),
        dict(B=64, N=65, C=192, order=(0, 2, 1)),
    ],
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


def slice_kernels(y, x, start, stop, step):
    steps, first = _window(x.shape, start, step)
    copy(y, x, y.shape, strides(y.shape), steps, x_start=first)


def slice_backward_kernels(dx, dy, start, stop, step):
    steps, first = _window(dx.shape, start, step)
    if dy.size < dx.size:
        fill(dx, 0.0)
    copy(dx, dy, dy.shape, steps, strides(dy.shape), y_start=first)


slicing = Op(
    "slice",
    shapes={"x": "B N C"},
    constants={"start": (), "stop": (), "step": ()},  # an entry an axis, as range() takes them: from slice.indices(size)
    outputs=lambda x, start, stop, step: {"y": tuple(len(r) for r in _picked(start, stop, step))},
    forward=Implementation(slice_reference, slice_kernels, slice_kernels),
    backward=Implementation(slice_backward_reference, slice_backward_kernels, slice_backward_kernels),
    cases=[
        dict(B=2, N=5, C=7, start=(0, 0, 0), stop=lambda s: (s["B"], 1, s["C"]), step=(1, 1, 1)),
        dict(B=3, N=7, C=5, start=lambda s: (s["B"] // 2, s["N"] - 1, s["C"] - 1), stop=lambda s: (s["B"], -1, -1), step=(1, -2, -1)),
        dict(x="N", N=9, start=lambda s: (s["N"] // 4,), stop=lambda s: (s["N"],), step=(3,)),
        dict(B=64, N=65, C=192, start=lambda s: (0, min(1, s["N"] - 1), 0), stop=lambda s: (s["B"], s["N"], s["C"]), step=(1, 1, 1)),
    ],
    cost=lambda x, start, stop, step: Cost(forward=0),
)
