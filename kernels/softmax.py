"""Softmax over the last axis.

y_i = exp(x_i) / Σ_j exp(x_j)
dx_i = y_i·(dy_i - Σ_j dy_j·y_j)
"""

from __future__ import annotations

from math import prod

import numpy as np

from .core.op import Cost, Implementation, Op
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.math import exp, highest
from .cpu.run import threads
from .cpu.strided import in_float32
from .cuda.kernel import Source
from .cuda.strided import grid_for

_source = Source("softmax")


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
    accepts={"x": "... C"},
    outputs=lambda x: {"y": x},
    forward=Implementation(softmax_reference, softmax_cpu, softmax_cuda),
    backward=Implementation(softmax_backward_reference, softmax_backward_cpu, softmax_backward_cuda),
    saves=("y",),
    cases=[dict(B=2, N=3, C=5), dict(B=3, N=2, C=1), dict(B=8, N=33, C=197)],
    cost=lambda x: Cost(forward=20 * prod(x), backward=4 * prod(x)),
)
