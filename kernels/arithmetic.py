"""Element-wise arithmetic with NumPy's broadcasting.

    add       y = a + b       da = dy              db = dy
    subtract  y = a - b       da = dy              db = -dy
    multiply  y = a·b         da = dy·b            db = dy·a
    divide    y = a / b       da = dy / b          db = -dy·y / b

Each gradient is summed over the axes along which its input was repeated. For divide, b is constant along them: db = -(Σ dy·y) / b.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .core.arrays import empty
from .core.devices import device_of
from .core.dtypes import accumulator_dtype
from .core.op import Cost, Implementation, Op, Shape
from .core.strides import ADD, DIVIDE, MULTIPLY
from .cpu import primitives as cpu
from .cuda import primitives as cuda


def _unbroadcast(gradient: np.ndarray, shape: Shape) -> np.ndarray:
    """A gradient summed over the axes along which an array of this shape was repeated."""
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


# ---------------------------------------------------------------------------------------------------------------------- kernels
def _gradient(on, d, operation, dy, other):
    """d = Σ dy·other or Σ dy / other, over the axes along which d is broadcast; does nothing if d is None."""
    if d is None:
        return
    if d.shape == dy.shape:
        on.combine(operation, d, dy, other)
    elif operation == MULTIPLY and other.shape == dy.shape:
        on.sum_into(d, dy, other)
    else:
        product = empty(dy.shape, accumulator_dtype(dy.dtype), device_of(dy))
        on.combine(operation, product, dy, other)
        on.sum_into(d, product)


def add_forward(on, y, a, b):
    on.combine(ADD, y, a, b)


def add_backward(on, da, db, dy):
    if da is not None:
        on.sum_into(da, dy)
    if db is not None:
        on.sum_into(db, dy)


def subtract_forward(on, y, a, b):
    on.combine(ADD, y, a, b, sign=-1.0)


def subtract_backward(on, da, db, dy):
    if da is not None:
        on.sum_into(da, dy)
    if db is not None:
        on.sum_into(db, dy, scale=-1.0)


def multiply_forward(on, y, a, b):
    on.combine(MULTIPLY, y, a, b)


def multiply_backward(on, da, db, dy, a, b):
    _gradient(on, da, MULTIPLY, dy, b)
    _gradient(on, db, MULTIPLY, dy, a)


def divide_forward(on, y, a, b):
    on.combine(DIVIDE, y, a, b)


def divide_backward(on, da, db, dy, b, y):
    _gradient(on, da, DIVIDE, dy, b)
    if db is not None:
        sums = empty(db.shape, accumulator_dtype(db.dtype), device_of(db))  # -Σ dy·y, not rounded before the division
        on.sum_into(sums, dy, y, scale=-1.0)
        on.combine(DIVIDE, db, sums, b)


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
    """An op; backward_operations: per element of y."""

    def cost(a: Shape, b: Shape) -> Cost:
        elements = prod(np.broadcast_shapes(a, b))
        return Cost(forward=elements, backward=backward_operations * elements)

    return Op(
        name,
        shapes={"a": "B N C", "b": "B N C"},
        accepts={"a": "*", "b": "*"},
        outputs=lambda a, b: {"y": np.broadcast_shapes(a, b)},
        forward=forward,
        backward=backward,
        cases=BROADCASTS,
        cost=cost,
        **more,
    )


add = _op(
    "add",
    Implementation.composed(add_reference, add_forward, cpu, cuda),
    Implementation.composed(add_backward_reference, add_backward, cpu, cuda),
)

subtract = _op(
    "subtract",
    Implementation.composed(subtract_reference, subtract_forward, cpu, cuda),
    Implementation.composed(subtract_backward_reference, subtract_backward, cpu, cuda),
)

multiply = _op(
    "multiply",
    Implementation.composed(multiply_reference, multiply_forward, cpu, cuda),
    Implementation.composed(multiply_backward_reference, multiply_backward, cpu, cuda),
    backward_operations=2,
    saves=("a", "b"),
)

divide = _op(
    "divide",
    Implementation.composed(divide_reference, divide_forward, cpu, cuda),
    Implementation.composed(divide_backward_reference, divide_backward, cpu, cuda),
    backward_operations=3,
    saves=("b", "y"),
    values={"b": lambda rng, shape, sizes: rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)},
)
