"""Element-wise arithmetic with NumPy's broadcasting.

    add       y = a + b       da = dy              db = dy
    subtract  y = a - b       da = dy              db = -dy
    multiply  y = a·b         da = dy·b            db = dy·a
    divide    y = a / b       da = dy / b          db = -dy·y / b

each gradient summed over the axes along which its input was repeated; in the last, b is constant over them, so that db = -(Σ dy·y) / b.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from . import cuda
from .copying import (
    bands_for,
    broadcast_strides,
    grid_for,
    in_float32,
    loop_width,
    nests,
    offset,
    rounds,
    share,
    strides,
    sum_into,
)
from .cpu import kernel
from .device import accumulator, empty, place_of
from .op import Cost, Implementation, Op, Shape, launch

PLUS, TIMES, OVER = range(3)
_source = cuda.Source("arithmetic")


def _unbroadcast(gradient: np.ndarray, shape: Shape) -> np.ndarray:
    """The sum of a gradient over the axes along which an array of this shape was repeated."""
    repeated = tuple(range(gradient.ndim - len(shape)))
    gradient = gradient.sum(repeated)
    return gradient.sum(tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)


def add_reference(y, a, b):
    y[...] = a + b


def add_backward_reference(da, db, dy):
    if da is not None:
        da[...] = _unbroadcast(dy, da.shape)
    if db is not None:
        db[...] = _unbroadcast(dy, db.shape)


def subtract_reference(y, a, b):
    y[...] = a - b


def subtract_backward_reference(da, db, dy):
    if da is not None:
        da[...] = _unbroadcast(dy, da.shape)
    if db is not None:
        db[...] = _unbroadcast(-dy, db.shape)


def multiply_reference(y, a, b):
    y[...] = a * b


def multiply_backward_reference(da, db, dy, a, b):
    if da is not None:
        da[...] = _unbroadcast(dy * b, da.shape)
    if db is not None:
        db[...] = _unbroadcast(dy * a, db.shape)


def divide_reference(y, a, b):
    y[...] = a / b


def divide_backward_reference(da, db, dy, b, y):
    if da is not None:
        da[...] = _unbroadcast(dy / b, da.shape)
    if db is not None:
        db[...] = _unbroadcast(-dy * y / b, db.shape)


@kernel
def _combine(band, bands, y, a, b, loops, y_start, a_start, b_start, operation, sign):
    factor = y.dtype.type(sign)
    first, last, start, stop = share(band, bands, loops)
    a_step, b_step = loops[3, 2], loops[3, 3]
    times = operation == TIMES
    for row in range(first, last):
        to = y_start + offset(row, loops, 1)
        a_at, b_at = a_start + offset(row, loops, 2), b_start + offset(row, loops, 3)
        if operation == OVER:
            for j in range(start, stop):  # unsigned indices: no test for those that count from the end
                y[np.uint64(to + j)] = a[np.uint64(a_at + j * a_step)] / b[np.uint64(b_at + j * b_step)]
        elif b_step == 0:
            v = b[b_at]
            for j in range(start, stop):
                u = a[np.uint64(a_at + j * a_step)]
                y[np.uint64(to + j)] = u * v if times else u + v * factor
        elif a_step == 0:
            u = a[a_at]
            for j in range(start, stop):
                v = b[np.uint64(b_at + j)]
                y[np.uint64(to + j)] = u * v if times else u + v * factor
        else:
            for j in range(start, stop):
                u, v = a[np.uint64(a_at + j)], b[np.uint64(b_at + j)]
                y[np.uint64(to + j)] = u * v if times else u + v * factor


def _arithmetic(operation: int, y: np.ndarray, a: np.ndarray, b: np.ndarray, sign: float = 1.0) -> None:
    """y = a + sign·b, a·b or a / b."""
    steps = strides(y.shape), broadcast_strides(a.shape, y.shape), broadcast_strides(b.shape, y.shape)
    for loops, starts in nests(y.shape, *steps):
        if place_of(y) == "cuda":
            width = loop_width(loops, tuple(starts), y, a, b)
            sizes = rounds(loops, width)
            repeats = [width > 1 and loops[3, i] == 0 for i in (2, 3)]
            launch(
                _source("combine", y.dtype, a.dtype, b.dtype, width, *repeats),
                grid_for(sizes[-1]),
                y,
                a,
                b,
                *sizes,
                *loops[:, 1:].T.reshape(-1).tolist(),
                *starts,
                operation,
                sign,
            )
            continue
        launch(_combine, bands_for(y.size), y.reshape(-1), a.reshape(-1), b.reshape(-1), loops, *starts, operation, sign)


def _gradient(d: np.ndarray | None, operation: int, dy: np.ndarray, other: np.ndarray) -> None:
    """d = Σ dy·other or Σ dy / other, over the axes along which d is broadcast."""
    if d is None:
        return
    if d.shape == dy.shape:
        _arithmetic(operation, d, dy, other)
    elif operation == TIMES and other.shape == dy.shape:
        sum_into(d, dy, other)
    else:
        product = empty(dy.shape, accumulator(dy.dtype), place_of(dy))
        _arithmetic(operation, product, dy, other)
        sum_into(d, product)


def add_kernels(y, a, b):
    _arithmetic(PLUS, y, a, b)


def add_backward_kernels(da, db, dy):
    if da is not None:
        sum_into(da, dy)
    if db is not None:
        sum_into(db, dy)


def subtract_kernels(y, a, b):
    _arithmetic(PLUS, y, a, b, sign=-1.0)


def subtract_backward_kernels(da, db, dy):
    if da is not None:
        sum_into(da, dy)
    if db is not None:
        sum_into(db, dy, scale=-1.0)


def multiply_kernels(y, a, b):
    _arithmetic(TIMES, y, a, b)


def multiply_backward_kernels(da, db, dy, a, b):
    _gradient(da, TIMES, dy, b)
    _gradient(db, TIMES, dy, a)


def divide_kernels(y, a, b):
    _arithmetic(OVER, y, a, b)


@in_float32(outputs=2)
def divide_backward_kernels(da, db, dy, b, y):
    _gradient(da, OVER, dy, b)
    if db is not None:
        sum_into(db, dy, y, scale=-1.0)
        _arithmetic(OVER, db, db, b)


BROADCASTS: list[dict[str, Any]] = [
    dict(B=2, N=3, C=5),
    dict(b="N C", B=3, N=5, C=7),
    dict(b="C", B=3, N=1, C=7),
    dict(a="1 N 1", B=3, N=5, C=4),
    dict(b="", B=2, N=3, C=4),
    dict(a="B 1 C", b="N 1", B=3, N=4, C=5),
    dict(a="A 1 C 1 E 1", b="1 B 1 D 1 F", A=2, B=3, C=2, D=3, E=2, F=3),
    dict(B=64, N=65, C=192),
    dict(b="C", B=64, N=65, C=192),
    dict(b="1 N C", B=64, N=65, C=192),
]


def _op(name: str, forward: Implementation, backward: Implementation, backward_operations: int = 1, **more: Any) -> Op:
    """backward_operations: for each element of y."""

    def cost(a: Shape, b: Shape) -> Cost:
        elements = prod(np.broadcast_shapes(a, b))
        return Cost(forward=elements, backward=backward_operations * elements)

    return Op(
        name,
        shapes={"a": "B N C", "b": "B N C"},
        outputs=lambda a, b: {"y": np.broadcast_shapes(a, b)},
        forward=forward,
        backward=backward,
        cases=BROADCASTS,
        cost=cost,
        **more,
    )


add = _op(
    "add",
    Implementation(add_reference, add_kernels, add_kernels),
    Implementation(add_backward_reference, add_backward_kernels, add_backward_kernels),
)

subtract = _op(
    "subtract",
    Implementation(subtract_reference, subtract_kernels, subtract_kernels),
    Implementation(subtract_backward_reference, subtract_backward_kernels, subtract_backward_kernels),
)

multiply = _op(
    "multiply",
    Implementation(multiply_reference, multiply_kernels, multiply_kernels),
    Implementation(multiply_backward_reference, multiply_backward_kernels, multiply_backward_kernels),
    backward_operations=2,
    saves=("a", "b"),
)

divide = _op(
    "divide",
    Implementation(divide_reference, divide_kernels, divide_kernels),
    Implementation(divide_backward_reference, divide_backward_kernels, divide_backward_kernels),
    backward_operations=3,
    saves=("b", "y"),
    values={"b": lambda rng, shape, sizes: rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)},
)
