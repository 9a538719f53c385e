"""Slices with a step along each axis.

y[i] = x[start + i·step]                along each axis
dx[start + i·step] = dy[i],  0 elsewhere
"""

from __future__ import annotations

from functools import partial
from math import gcd, prod

import numpy as np

from .core.op import Cost, Implementation, Op, Shape
from .core.recording import launch
from .core.strides import strides
from .cpu import primitives as cpu
from .cuda import primitives as cuda
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

_source = Source("slice")


def _picked(start: Shape, stop: Shape, step: Shape) -> list[range]:
    return [range(*bounds) for bounds in zip(start, stop, step)]


def forward_reference(y, x, start, stop, step):
    y[...] = x[np.ix_(*_picked(start, stop, step))]


def backward_reference(dx, dy, start, stop, step):
    dx[...] = 0
    dx[np.ix_(*_picked(start, stop, step))] = dy


def _window(shape: Shape, start: Shape, step: Shape) -> tuple[Shape, int]:
    """The strides and the first element of a slice."""
    steps = strides(shape)
    return tuple(a * b for a, b in zip(step, steps)), sum(a * b for a, b in zip(start, steps))


def forward(on, y, x, start, stop, step):
    steps, first = _window(x.shape, start, step)
    on.copy(y, x, y.shape, strides(y.shape), steps, x_start=first)


def backward(on, dx, dy, start, stop, step):
    steps, first = _window(dx.shape, start, step)
    if dy.size < dx.size:
        on.fill(dx, 0.0)
    on.copy(dx, dy, dy.shape, steps, strides(dy.shape), y_start=first)


def backward_cuda(dx, dy, start, stop, step):
    """One launch where one axis is cut, in steps of 1."""
    cut = [axis for axis, (size, whole) in enumerate(zip(dy.shape, dx.shape)) if size < whole]
    if len(cut) != 1 or any(by != 1 for by, size in zip(step, dy.shape) if size > 1):
        return backward(cuda, dx, dy, start, stop, step)
    channels = prod(dx.shape[cut[0] + 1 :])
    row, first, length = (n * channels for n in (dx.shape[cut[0]], start[cut[0]], dy.shape[cut[0]]))
    width = vector_width(gcd(row, first, length), dx, dy)
    launch(_source("slice_backward", dx.dtype, width), grid_for(dx.size // width), dx, dy, dx.size, row, first, length)


def _outputs(x, start, stop, step):
    picked = _picked(start, stop, step)
    if not len(x) == len(start) == len(stop) == len(step) or any(r and not 0 <= min(r) <= max(r) < size for r, size in zip(picked, x)):
        raise ValueError(f"slice: {start}, {stop}, {step} do not lie in {x}")
    return {"y": tuple(map(len, picked))}


slicing = Op(
    "slice",
    shapes={"x": "B N C"},
    accepts={"x": "*"},
    constants={"start": (), "stop": (), "step": ()},  # one entry per axis, from slice.indices(size), as for range()
    outputs=_outputs,
    forward=Implementation.composed(forward_reference, forward, cpu, cuda),
    backward=Implementation(backward_reference, partial(backward, cpu), backward_cuda),
    cases=[
        dict(B=2, N=5, C=7, start=(0, 0, 0), stop=lambda s: (s["B"], 1, s["C"]), step=(1, 1, 1)),
        dict(B=3, N=7, C=5, start=lambda s: (s["B"] // 2, s["N"] - 1, s["C"] - 1), stop=lambda s: (s["B"], -1, -1), step=(1, -2, -1)),
        dict(x="N", N=9, start=lambda s: (s["N"] // 4,), stop=lambda s: (s["N"],), step=(3,)),
        dict(B=5, N=6, C=16, start=lambda s: (0, s["N"] // 3, 0), stop=lambda s: (s["B"], s["N"] - s["N"] // 6, s["C"]), step=(1, 1, 1)),
        dict(x="N C", N=9, C=7, start=lambda s: (0, s["C"] // 2), stop=lambda s: (s["N"], s["C"]), step=(1, 1)),
        dict(B=64, N=65, C=192, start=lambda s: (0, min(1, s["N"] - 1), 0), stop=lambda s: (s["B"], s["N"], s["C"]), step=(1, 1, 1)),
    ],
    cost=lambda x, start, stop, step: Cost(forward=0),
)
