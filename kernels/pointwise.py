"""Element-wise arithmetic with NumPy's broadcasting, GELU (Hendrycks and Gimpel, 1606.08415), and softmax over the last axis.

    add       y = a + b       da = dy              db = dy
    subtract  y = a - b       da = dy              db = -dy
    multiply  y = a·b         da = dy·b            db = dy·a
    divide    y = a / b       da = dy / b          db = -dy·y / b

each gradient summed over the axes along which its input was repeated; in the last, b is constant over them, so that db = -(Σ dy·y) / b.

    gelu      y = x·Φ(x)                           dx = dy·(Φ(x) + x·Φ'(x))          (Φ: see cpu/math.py)
    softmax   y_i = exp(x_i) / Σ_j exp(x_j)        dx_i = y_i·(dy_i - Σ_j dy_j·y_j)
"""
from __future__ import annotations

import math
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
    vector_width,
)
from .cpu import kernel, threads
from .cpu.math import exp, gelu_erf, gelu_tanh, highest
from .device import accumulator, empty, place_of
from .op import Cost, Implementation, Op, Shape, launch

PLUS, TIMES, OVER = range(3)
_source = cuda.Source("pointwise")


# ------------------------------------------------------------------------------------------------------------- arithmetic
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
            for j in range(start, stop):                # unsigned indices: no test for those that count from the end
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
            launch(_source("combine", y.dtype, a.dtype, b.dtype, operation, width, *repeats), grid_for(sizes[-1]), y, a, b, *sizes,
                   *loops[:, 1:].T.reshape(-1).tolist(), *starts, sign)
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
    dict(B=2, N=3, C=5), dict(b="N C", B=3, N=5, C=7), dict(b="C", B=3, N=1, C=7), dict(a="1 N 1", B=3, N=5, C=4),
    dict(b="", B=2, N=3, C=4), dict(a="B 1 C", b="N 1", B=3, N=4, C=5),
    dict(a="A 1 C 1 E 1", b="1 B 1 D 1 F", A=2, B=3, C=2, D=3, E=2, F=3),
    dict(B=64, N=65, C=192), dict(b="C", B=64, N=65, C=192), dict(b="1 N C", B=64, N=65, C=192),
]

add = Op(
    "add",
    shapes={"a": "B N C", "b": "B N C"},
    outputs=lambda a, b: {"y": np.broadcast_shapes(a, b)},
    forward=Implementation(add_reference, add_kernels, add_kernels),
    backward=Implementation(add_backward_reference, add_backward_kernels, add_backward_kernels),
    cases=BROADCASTS,
    cost=lambda a, b: Cost(forward=prod(np.broadcast_shapes(a, b)), backward=prod(np.broadcast_shapes(a, b))),
)

subtract = Op(
    "subtract",
    shapes={"a": "B N C", "b": "B N C"},
    outputs=lambda a, b: {"y": np.broadcast_shapes(a, b)},
    forward=Implementation(subtract_reference, subtract_kernels, subtract_kernels),
    backward=Implementation(subtract_backward_reference, subtract_backward_kernels, subtract_backward_kernels),
    cases=BROADCASTS,
    cost=lambda a, b: Cost(forward=prod(np.broadcast_shapes(a, b)), backward=prod(np.broadcast_shapes(a, b))),
)

multiply = Op(
    "multiply",
    shapes={"a": "B N C", "b": "B N C"},
    outputs=lambda a, b: {"y": np.broadcast_shapes(a, b)},
    forward=Implementation(multiply_reference, multiply_kernels, multiply_kernels),
    backward=Implementation(multiply_backward_reference, multiply_backward_kernels, multiply_backward_kernels),
    saves=("a", "b"),
    cases=BROADCASTS,
    cost=lambda a, b: Cost(forward=prod(np.broadcast_shapes(a, b)), backward=2 * prod(np.broadcast_shapes(a, b))),
)

divide = Op(
    "divide",
    shapes={"a": "B N C", "b": "B N C"},
    outputs=lambda a, b: {"y": np.broadcast_shapes(a, b)},
    forward=Implementation(divide_reference, divide_kernels, divide_kernels),
    backward=Implementation(divide_backward_reference, divide_backward_kernels, divide_backward_kernels),
    saves=("b", "y"),
    cases=BROADCASTS,
    cost=lambda a, b: Cost(forward=prod(np.broadcast_shapes(a, b)), backward=3 * prod(np.broadcast_shapes(a, b))),
    values={"b": lambda rng, shape, sizes: rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)},
)


# ------------------------------------------------------------------------------------------------------------------- gelu
def gelu_terms(x: np.ndarray, approximate: str) -> tuple[np.ndarray, np.ndarray]:
    """Φ(x) and Φ'(x), or their approximations by tanh."""
    if approximate == "tanh":
        t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return (1 + t) / 2, (1 - t * t) / 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    cdf = np.vectorize(math.erfc, otypes=[x.dtype])(-x * math.sqrt(0.5)) / 2
    return cdf, np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu_reference(y, x, approximate):
    y[...] = x * gelu_terms(x, approximate)[0]


def gelu_backward_reference(dx, dy, x, approximate):
    cdf, density = gelu_terms(x, approximate)
    dx[...] = dy * (cdf + x * density)


@kernel
def _gelu(band, bands, y, x, tanh_form):
    first, last = band * len(x) // bands, (band + 1) * len(x) // bands
    y, x = y[first:last], x[first:last]
    if tanh_form:
        for i in range(len(x)):
            y[i] = gelu_tanh(x[i])[0]
    else:
        for i in range(len(x)):
            y[i] = gelu_erf(x[i])[0]


@kernel
def _gelu_backward(band, bands, dx, dy, x, tanh_form):
    first, last = band * len(x) // bands, (band + 1) * len(x) // bands
    dx, dy, x = dx[first:last], dy[first:last], x[first:last]
    if tanh_form:
        for i in range(len(x)):
            dx[i] = dy[i] * gelu_tanh(x[i])[1]
    else:
        for i in range(len(x)):
            dx[i] = dy[i] * gelu_erf(x[i])[1]


def gelu_gradient(dx, a, dy, x, tanh_form):
    """On a GPU, dx = dy·gelu'(x), and a = gelu(x) where it is not None; dx may be dy."""
    width = vector_width(x.size, *(m for m in (dx, a, dy, x) if m is not None))
    launch(_source("gelu_backward", x.dtype, width, tanh_form), grid_for(x.size // width), dx, a, dy, x, x.size)


def gelu_kernels(y, x, approximate):
    if place_of(x) == "cuda":
        width = vector_width(x.size, y, x)
        launch(_source("gelu_forward", x.dtype, width, approximate == "tanh"), grid_for(x.size // width), y, x, x.size)
    else:
        launch(_gelu, bands_for(x.size), y.reshape(-1), x.reshape(-1), approximate == "tanh")


def gelu_backward_kernels(dx, dy, x, approximate):
    if place_of(x) == "cuda":
        gelu_gradient(dx, None, dy, x, approximate == "tanh")
    else:
        launch(_gelu_backward, bands_for(x.size), dx.reshape(-1), dy.reshape(-1), x.reshape(-1), approximate == "tanh")


gelu = Op(
    "gelu",
    shapes={"x": "B N C"},
    constants={"approximate": "none"},                  # or "tanh"
    outputs=lambda x, approximate: {"y": x},
    forward=Implementation(gelu_reference, gelu_kernels, gelu_kernels),
    backward=Implementation(gelu_backward_reference, gelu_backward_kernels, gelu_backward_kernels),
    saves=("x",),
    cases=[dict(B=2, N=3, C=5), dict(B=2, N=3, C=5, approximate="tanh"), dict(B=1, N=1, C=1), dict(B=64, N=65, C=768)],
    cost=lambda x, approximate: Cost(forward=30 * prod(x), backward=35 * prod(x)),
    values={"x": lambda rng, shape, sizes: rng.normal(0, 3, shape)},
)


# ---------------------------------------------------------------------------------------------------------------- softmax
def softmax_reference(y, x):
    e = np.exp(x - x.max(-1, keepdims=True))
    y[...] = e / e.sum(-1, keepdims=True)


def softmax_backward_reference(dx, dy, y):
    dx[...] = y * (dy - (dy * y).sum(-1, keepdims=True))


@kernel
def _softmax(band, bands, y, x):
    R, C = x.shape
    number = x.dtype.type
    for i in range(band * R // bands, (band + 1) * R // bands):
        largest = highest(x[i], 0, C)
        total = number(0)
        for j in range(C):
            e = exp(x[i, j] - largest)
            y[i, j] = e
            total += e
        for j in range(C):
            y[i, j] *= number(1) / total


@kernel
def _softmax_backward(band, bands, dx, dy, y):
    R, C = y.shape
    number = y.dtype.type
    for i in range(band * R // bands, (band + 1) * R // bands):
        total = number(0)
        for j in range(C):
            total += dy[i, j] * y[i, j]
        for j in range(C):
            dx[i, j] = y[i, j] * (dy[i, j] - total)


@in_float32(outputs=1)
def softmax_cpu(y, x):
    launch(_softmax, threads(), y.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]))


def softmax_backward_cpu(dx, dy, y):
    C = y.shape[-1]
    launch(_softmax_backward, threads(), dx.reshape(-1, C), dy.reshape(-1, C), y.reshape(-1, C))


def softmax_cuda(y, x):
    C = x.shape[-1]
    launch(_source("softmax_forward", x.dtype), grid_for(32 * x.size // C), y, x, x.size // C, C)


def softmax_backward_cuda(dx, dy, y):
    C = y.shape[-1]
    launch(_source("softmax_backward", y.dtype), grid_for(32 * y.size // C), dx, dy, y, y.size // C, C)


softmax = Op(
    "softmax",
    shapes={"x": "B N C"},
    outputs=lambda x: {"y": x},
    forward=Implementation(softmax_reference, softmax_cpu, softmax_cuda),
    backward=Implementation(softmax_backward_reference, softmax_backward_cpu, softmax_backward_cuda),
    saves=("y",),
    cases=[dict(B=2, N=3, C=5), dict(B=3, N=2, C=1), dict(B=8, N=33, C=197)],
    cost=lambda x: Cost(forward=20 * prod(x), backward=4 * prod(x)),
)
