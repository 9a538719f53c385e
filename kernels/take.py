"""Rows of a tensor by number, some of them several times or not at all.

y[a, i, c] = x[a, index[i], c]
dx[a, r, c] = Σ dy[a, i, c] over the i with index[i] = r

Each part of backward's work owns some rows of dx and walks through the whole index, so that every sum is in the order of the index.

Letters: A what precedes the rows, R rows of x, C what follows them, P numbers. The numbers are 0 … R - 1; kernels do not look.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .core.arrays import empty
from .core.devices import runtime
from .core.dtypes import accumulator_dtype
from .core.op import Cost, Implementation, Op
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.strided import bands_for, in_float32
from .cuda import primitives as cuda
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

_source = Source("take")


def forward_reference(y, x, index):
    y[...] = x[:, index]


def backward_reference(dx, dy, index):
    dx[...] = 0
    for i, r in enumerate(index):
        dx[:, r] += dy[:, i]


@kernel
def _take(band, bands, y, x, index):
    A, P, C = y.shape
    for item in range(band * A * P // bands, (band + 1) * A * P // bands):
        a, i = item // P, item % P
        r = index[i]
        for c in range(C):
            y[a, i, np.uint64(c)] = x[a, r, np.uint64(c)]


@kernel
def _take_backward(band, bands, dx, dy, index):
    A, R, C = dx.shape
    start, stop = band * A * R // bands, (band + 1) * A * R // bands  # of the rows of all a
    for a in range(start // R, (stop + R - 1) // R):
        first, last = max(0, start - a * R), min(R, stop - a * R)
        for r in range(first, last):
            for c in range(C):
                dx[a, r, np.uint64(c)] = 0
        for i in range(len(index)):
            r = index[i]
            if first <= r < last:
                for c in range(C):
                    dx[a, r, np.uint64(c)] += dy[a, i, np.uint64(c)]


def forward_cpu(y, x, index):
    launch(_take, bands_for(y.size), y, x, index)


@in_float32(outputs=1)
def backward_cpu(dx, dy, index):
    launch(_take_backward, bands_for(max(dx.size, dy.size)), dx, dy, index)


def forward_cuda(y, x, index):
    A, P, C = y.shape
    width = vector_width(C, y, x)
    launch(_source("take", x.dtype, width), grid_for(y.size // width), y, x, index, A, x.shape[1], C, P)


def backward_cuda(dx, dy, index):
    A, R, C = dx.shape
    sums: Any = dx if accumulator_dtype(dx.dtype) == dx.dtype else empty(dx.shape, accumulator_dtype(dx.dtype), "cuda")
    parts = max(1, min(R, runtime().multiprocessors * 1024 // (A * C)))
    launch(_source("take_backward", sums.dtype, dy.dtype), grid_for(A * parts * C), sums, dy, index, A, R, C, len(index), parts)
    if sums is not dx:
        cuda.convert(dx, sums)


take = Op(
    "take",
    shapes={"x": "A R C", "index": "P"},
    dtypes={"index": (np.int64,)},
    outputs=lambda x, index: {"y": (x[0], *index, x[2])},
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    gradients=("x",),
    saves=("index",),
    cases=[dict(A=2, R=5, C=8, P=11), dict(A=1, R=7, C=1, P=3), dict(A=64, R=65, C=192, P=33)],
    cost=lambda x, index: Cost(forward=0, backward=prod(index) * x[0] * x[2]),
    values={"index": lambda rng, shape, sizes: rng.integers(0, sizes["R"], shape)},
)
