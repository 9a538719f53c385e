"""Element-wise arithmetic with NumPy's broadcasting.

    add       y = a + b       da = dy              db = dy
    subtract  y = a - b       da = dy              db = -dy
    multiply  y = a·b         da = dy·b            db = dy·a
    divide    y = a / b       da = dy / b          db = -dy·y / b
    power     y = aᵇ          da = dy·b·aᵇ⁻¹       db = dy·y·ln a
    maximum   y = max(a, b)   da = dy·[a > b]      db = dy·[b > a]
    minimum   y = min(a, b)   da = dy·[a < b]      db = dy·[b < a]

Each gradient is summed over the axes along which its input was repeated. For divide, b is constant along them: db = -(Σ dy·y) / b.
Where a = b, maximum and minimum have no derivative; each of the two gets half of the gradient, [a > b] = ½. aᵇ is NumPy's: 0⁰ = 1, and NaN
for a < 0 where b is no whole number. The limits are taken where a formula has none: da = 0 for b = 0, and db = 0 for a = 0 and b >= 0.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from .core.arrays import empty
from .core.devices import device_of
from .core.dtypes import accumulator_dtype
from .core.op import Cost, Implementation, Op, Shape
from .core.strides import ADD, DIVIDE, IS_LARGER, MAXIMUM, MINIMUM, MULTIPLY, POWER, POWER_BY_BASE, POWER_BY_EXPONENT
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


def power_reference(y, a, b):
    y[...] = a**b


def power_backward_reference(da, db, dy, a, b):
    if da is not None:
        da[...] = _unbroadcast(dy * np.where(b == 0, 0, b * a ** np.where(b == 0, 1, b - 1)), da.shape)
    if db is not None:
        none = (a == 0) & (b >= 0)
        db[...] = _unbroadcast(dy * np.where(none, 0, a**b * np.log(np.where(none, 1, a))), db.shape)


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[a > b], and ½ where they are equal."""
    return ((a > b) + (a >= b) * 1.0) / 2


def maximum_reference(y, a, b):
    y[...] = np.maximum(a, b)


def maximum_backward_reference(da, db, dy, a, b):
    if da is not None:
        da[...] = _unbroadcast(dy * _share(a, b), da.shape)
    if db is not None:
        db[...] = _unbroadcast(dy * _share(b, a), db.shape)


def minimum_reference(y, a, b):
    y[...] = np.minimum(a, b)


def minimum_backward_reference(da, db, dy, a, b):
    maximum_backward_reference(da, db, dy, -a, -b)


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


def _gradient_by(on, d, operation, dy, a, b):
    """d = Σ dy·operation(a, b) over the axes along which d is broadcast; does nothing if d is None."""
    if d is not None:
        slope = empty(dy.shape, accumulator_dtype(dy.dtype), device_of(dy))
        on.combine(operation, slope, a, b)
        _gradient(on, d, MULTIPLY, dy, slope)


def power_forward(on, y, a, b):
    on.combine(POWER, y, a, b)


def power_backward(on, da, db, dy, a, b):
    _gradient_by(on, da, POWER_BY_BASE, dy, a, b)
    _gradient_by(on, db, POWER_BY_EXPONENT, dy, a, b)


def maximum_forward(on, y, a, b):
    on.combine(MAXIMUM, y, a, b)


def maximum_backward(on, da, db, dy, a, b):
    _gradient_by(on, da, IS_LARGER, dy, a, b)
    _gradient_by(on, db, IS_LARGER, dy, b, a)


def minimum_forward(on, y, a, b):
    on.combine(MINIMUM, y, a, b)


def minimum_backward(on, da, db, dy, a, b):
    maximum_backward(on, da, db, dy, b, a)


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


def _op(name: str, forward: Implementation, backward: Implementation, backward_operations: int = 1, operations: int = 1, **more: Any) -> Op:
    """An op; operations of forward and of backward: per element of y."""

    def cost(a: Shape, b: Shape) -> Cost:
        elements = prod(np.broadcast_shapes(a, b))
        return Cost(forward=operations * elements, backward=backward_operations * elements)

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

power = _op(
    "power",
    Implementation.composed(power_reference, power_forward, cpu, cuda),
    Implementation.composed(power_backward_reference, power_backward, cpu, cuda),
    operations=40,
    backward_operations=100,
    saves=("a", "b"),
    values={"a": lambda rng, shape, sizes: rng.uniform(0.3, 3, shape)},
)


def _apart(rest: float) -> Callable:
    """Values whose distance from those with another `rest` is never small: maximum has no derivative where they are equal."""
    return lambda rng, shape, sizes: np.round(rng.normal(0, 5, shape)) / 5 + rest


maximum = _op(
    "maximum",
    Implementation.composed(maximum_reference, maximum_forward, cpu, cuda),
    Implementation.composed(maximum_backward_reference, maximum_backward, cpu, cuda),
    backward_operations=4,
    saves=("a", "b"),
    values={"a": _apart(0), "b": _apart(0.1)},
)

minimum = _op(
    "minimum",
    Implementation.composed(minimum_reference, minimum_forward, cpu, cuda),
    Implementation.composed(minimum_backward_reference, minimum_backward, cpu, cuda),
    backward_operations=4,
    saves=("a", "b"),
    values={"a": _apart(0), "b": _apart(0.1)},
)
