"""Broadcasting to a shape, by NumPy's rules.

y = x, repeated
dx = Σ dy over the repeated axes
"""

from __future__ import annotations

from math import prod

import numpy as np

from .core.op import Cost, Implementation, Op
from .core.strides import broadcast_strides, strides
from .cpu import primitives as cpu
from .cuda import primitives as cuda


def forward_reference(y, x, shape):
    y[...] = x


def backward_reference(dx, dy, shape):
    added = dy.ndim - dx.ndim
    repeated = tuple(i for i, size in enumerate((1,) * added + dx.shape) if size == 1)
    dx[...] = dy.sum(repeated, keepdims=True).reshape(dx.shape)


def forward(on, y, x, shape):
    on.copy(y, x, y.shape, strides(y.shape), broadcast_strides(x.shape, y.shape))


def backward(on, dx, dy, shape):
    on.sum_into(dx, dy)


def _outputs(x, shape):
    if np.broadcast_shapes(x, shape) != tuple(shape):
        raise ValueError(f"broadcast: {x} does not repeat to {shape}")
    return {"y": tuple(shape)}


broadcast = Op(
    "broadcast",
    shapes={"x": "1 N C"},
    accepts={"x": "*"},
    constants={"shape": ()},
    outputs=_outputs,
    forward=Implementation.composed(forward_reference, forward, cpu, cuda),
    backward=Implementation.composed(backward_reference, backward, cpu, cuda),
    cases=[
        dict(B=4, N=3, C=5, shape=lambda s: (s["B"], s["N"], s["C"])),
        dict(x="", N=3, shape=lambda s: (s["N"],)),
        dict(x="N 1 C", B=2, M=5, N=3, C=7, shape=lambda s: (s["B"], s["N"], s["M"], s["C"])),
        dict(B=64, N=1, C=192, shape=lambda s: (s["B"], s["N"], s["C"])),
    ],
    cost=lambda x, shape: Cost(forward=0, backward=prod(shape)),
)
