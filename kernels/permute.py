"""Permutation of the axes.

y[i_order[0], i_order[1], ...] = x[i_0, i_1, ...]
dx = dy, permuted by the inverse of order
"""

from __future__ import annotations

import numpy as np

from .core.op import Cost, Implementation, Op
from .core.strides import strides
from .cpu import primitives as cpu
from .cuda import primitives as cuda


def forward_reference(y, x, order):
    y[...] = x.transpose(order)


def backward_reference(dx, dy, order):
    dx.transpose(order)[...] = dy


def forward(on, y, x, order):
    source = strides(x.shape)
    on.copy(y, x, y.shape, strides(y.shape), tuple(source[axis] for axis in order))


def backward(on, dx, dy, order):
    forward(on, dx, dy, tuple(int(axis) for axis in np.argsort(np.array(order) % dx.ndim)))


def _outputs(x, order):
    if sorted(axis % max(len(x), 1) for axis in order) != list(range(len(x))) or any(not -len(x) <= axis < len(x) for axis in order):
        raise ValueError(f"permute: {order} is no permutation of the axes of {x}")
    return {"y": tuple(x[axis] for axis in order)}


permute = Op(
    "permute",
    shapes={"x": "B N C"},
    accepts={"x": "*"},
    constants={"order": ()},
    outputs=_outputs,
    forward=Implementation.composed(forward_reference, forward, cpu, cuda),
    backward=Implementation.composed(backward_reference, backward, cpu, cuda),
    cases=[
        dict(B=2, N=3, C=5, order=(0, 2, 1)),
        dict(B=2, N=3, C=5, order=(1, 0, -1)),
        dict(x="A B C D E", A=2, B=3, C=4, D=5, E=3, order=(4, 2, 0, 3, 1)),
        dict(x="N C", N=1, C=1, order=(1, 0)),
        dict(B=64, N=65, C=192, order=(0, 2, 1)),
    ],
    cost=lambda x, order: Cost(forward=0),
)
