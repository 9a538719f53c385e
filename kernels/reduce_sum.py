"""Scaled sum over axes; a mean has scale 1/n.

y = scale·Σ x over axes
dx = scale·dy, repeated along the axes
"""

from __future__ import annotations

from math import prod

from .core.op import Cost, Implementation, Op, Shape
from .core.strides import broadcast_strides, strides
from .cpu import primitives as cpu
from .cuda import primitives as cuda


def _summed(shape: Shape, axes: Shape | None) -> Shape:
    return tuple(range(len(shape))) if axes is None else tuple(axis % len(shape) for axis in axes)


def _keepdims_shape(shape: Shape, axes: Shape | None) -> Shape:
    """The shape of a sum over these axes (None: all) with keepdims."""
    return tuple(1 if i in _summed(shape, axes) else size for i, size in enumerate(shape))


def _sum_shape(shape: Shape, axes: Shape | None, keepdims: bool) -> Shape:
    return _keepdims_shape(shape, axes) if keepdims else tuple(size for i, size in enumerate(shape) if i not in _summed(shape, axes))


def forward_reference(y, x, axes, keepdims, scale):
    y[...] = scale * x.sum(axes, keepdims=keepdims)


def backward_reference(dx, dy, axes, keepdims, scale):
    dx[...] = scale * dy.reshape(_keepdims_shape(dx.shape, axes))


def forward(on, y, x, axes, keepdims, scale):
    on.sum_into(y.reshape(_keepdims_shape(x.shape, axes)), x, scale=scale)


def backward(on, dx, dy, axes, keepdims, scale):
    on.copy(dx, dy, dx.shape, strides(dx.shape), broadcast_strides(_keepdims_shape(dx.shape, axes), dx.shape), scale=scale)


def _outputs(x, axes, keepdims, scale):
    if axes is not None and any(not -len(x) <= axis < len(x) for axis in axes):
        raise ValueError(f"reduce_sum: {x} has no axes {axes}")
    return {"y": _sum_shape(x, axes, keepdims)}


reduce_sum = Op(
    "reduce_sum",
    shapes={"x": "B N C"},
    accepts={"x": "*"},
    constants={"axes": None, "keepdims": False, "scale": 1.0},  # a mean has scale 1/n
    outputs=_outputs,
    forward=Implementation.composed(forward_reference, forward, cpu, cuda),
    backward=Implementation.composed(backward_reference, backward, cpu, cuda),
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
