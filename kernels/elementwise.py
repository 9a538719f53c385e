"""Functions of one variable, element by element: y = f(x), dx = dy·f'(x). Backward reads x or y, from which it computes the derivative f'.

    exp          eˣ                          y
    log          ln x                        1 / x
    sqrt         √x                          1 / 2y
    absolute     |x|                         the sign of x
    tanh         (eˣ - e⁻ˣ) / (eˣ + e⁻ˣ)     1 - y²
    sigmoid      1 / (1 + e⁻ˣ)               y·(1 - y)
    relu         max(x, 0)                   1 for y > 0                         (Glorot et al., AISTATS 2011)
    relu6        min(max(x, 0), 6)           1 for 0 < y < 6                     (1704.04861)
    hardsigmoid  relu6(x + 3) / 6            1/6 for -3 < x < 3                  (1905.02244, section 5.2)
    hardswish    x·hardsigmoid(x)            (2x + 3) / 6 for -3 < x < 3, 1 from 3 on

Elsewhere a derivative is 0, and so it is at the ends of what is flat: relu'(0) = 0, |0|' = 0, hardswish'(-3) = 0. Outside its domain a
function is as NumPy's, but without a warning: log(0) = -∞, log(-1) = √-1 = NaN. NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod

import numpy as np
from numba import njit

from .core.op import Cost, Implementation, Op
from .core.recording import launch
from .cpu.kernel import Kernel, named_kernel
from .cpu.math import OPTIONS, clip, exp, log, logistic, tanh
from .cpu.strided import bands_for
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

_source = Source("elementwise")
Scalar = Callable[..., float]  # a function of a number that kernels call
Pair = tuple[Callable, Callable]  # a function, and its derivative as a function of what backward reads


# ----------------------------------------------------------------------------------------------------------- implementations
def _references(function: Callable, derivative: Callable) -> Pair:
    def forward(y, x):
        y[...] = function(x)

    def backward(dx, dy, saved):
        dx[...] = dy * derivative(saved)

    return forward, backward


def _on_cpu(name: str, function: Scalar, derivative: Scalar) -> Pair:
    value, slope = njit(**OPTIONS)(function), njit(**OPTIONS)(derivative)

    def forward(band, bands, y, x):
        first, last = band * len(x) // bands, (band + 1) * len(x) // bands
        y, x = y[first:last], x[first:last]
        for i in range(len(x)):
            y[i] = value(x[i])

    def backward(band, bands, dx, dy, saved):
        first, last = band * len(dx) // bands, (band + 1) * len(dx) // bands
        number = dx.dtype.type
        dx, dy, saved = dx[first:last], dy[first:last], saved[first:last]
        for i in range(len(dx)):
            dx[i] = dy[i] * number(slope(saved[i]))

    kernels = named_kernel(name, forward), named_kernel(f"{name}_backward", backward)

    def run(kernel: Kernel, *arrays: np.ndarray) -> None:
        launch(kernel, bands_for(arrays[0].size), *(a.reshape(-1) for a in arrays))

    return lambda y, x: run(kernels[0], y, x), lambda dx, dy, saved: run(kernels[1], dx, dy, saved)


def _on_cuda(name: str) -> Pair:
    def run(direction: str, *arrays) -> None:
        size = arrays[0].size
        width = vector_width(size, *arrays)
        launch(_source(f"{name}_{direction}", arrays[0].dtype, width), grid_for(size // width), *arrays, size)

    return lambda y, x: run("forward", y, x), lambda dx, dy, saved: run("backward", dx, dy, saved)


def _op(name: str, reference: Pair, cpu: Pair, saves: str, flops: int, kinks: tuple[float, ...] = (), lowest: float | None = None) -> Op:
    """An op from functions with their derivatives; its CUDA kernels have its name in elementwise.cu.

    reference: in NumPy. cpu: for numbers, inside kernels. saves: "x" or "y", which the derivatives take. flops: operations per element.
    kinks: where there is no derivative, so that checks keep away from there. lowest: x is positive, and at least this in checks.
    """

    def values(rng, shape, sizes):
        x = rng.normal(0, 3, shape) if lowest is None else rng.uniform(lowest, 5, shape)
        for kink in kinks:
            x = np.where(np.abs(x - kink) < 0.01, kink + 0.02, x)
        return x

    (forward, backward), (forward_cpu, backward_cpu), (forward_cuda, backward_cuda) = (
        _references(*reference),
        _on_cpu(name, *cpu),
        _on_cuda(name),
    )
    return Op(
        name,
        shapes={"x": "B N C"},
        accepts={"x": "*"},
        outputs=lambda x: {"y": x},
        forward=Implementation(forward, forward_cpu, forward_cuda),
        backward=Implementation(backward, backward_cpu, backward_cuda),
        saves=(saves,),
        cases=[dict(B=2, N=3, C=5), dict(x="", N=1), dict(B=64, N=65, C=192)],
        cost=lambda x: Cost(forward=flops * prod(x), backward=2 * prod(x)),
        values={"x": values},
    )


# ----------------------------------------------------------------------------------------------------------------- functions
exponential = _op("exp", reference=(np.exp, lambda y: y), cpu=(lambda x: exp(x), lambda y: y), saves="y", flops=15)

logarithm = _op("log", reference=(np.log, lambda x: 1 / x), cpu=(lambda x: log(x), lambda x: 1 / x), saves="x", flops=20, lowest=0.1)

sqrt = _op(
    "sqrt", reference=(np.sqrt, lambda y: 0.5 / y), cpu=(lambda x: math.sqrt(x), lambda y: type(y)(0.5) / y), saves="y", flops=1, lowest=0.1
)

absolute = _op(
    "absolute",
    reference=(np.abs, np.sign),
    cpu=(lambda x: abs(x), lambda x: 1 if x > 0 else -1 if x < 0 else 0),
    saves="x",
    flops=1,
    kinks=(0,),
)

hyperbolic_tangent = _op(
    "tanh", reference=(np.tanh, lambda y: 1 - y * y), cpu=(lambda x: tanh(x), lambda y: type(y)(1) - y * y), saves="y", flops=25
)

sigmoid = _op(
    "sigmoid",
    reference=(lambda x: 1 / (1 + np.exp(-x)), lambda y: y * (1 - y)),
    cpu=(lambda x: logistic(x), lambda y: y * (type(y)(1) - y)),
    saves="y",
    flops=20,
)

relu = _op(
    "relu",
    reference=(lambda x: np.maximum(x, 0), lambda y: y > 0),
    cpu=(lambda x: max(x, type(x)(0)), lambda y: 1 if y > 0 else 0),
    saves="y",
    flops=1,
    kinks=(0,),
)

relu6 = _op(
    "relu6",
    reference=(lambda x: np.clip(x, 0, 6), lambda y: (y > 0) & (y < 6)),
    cpu=(lambda x: clip(x, type(x)(0), type(x)(6)), lambda y: 1 if y > 0 and y < 6 else 0),
    saves="y",
    flops=2,
    kinks=(0, 6),
)


def _hardsigmoid(x):
    number = type(x)
    return clip(x + number(3), number(0), number(6)) * number(1 / 6)


def _hardsigmoid_slope(x):
    number = type(x)
    return number(1 / 6) if x > -3 and x < 3 else number(0)


hardsigmoid = _op(
    "hardsigmoid",
    reference=(lambda x: np.clip(x + 3, 0, 6) / 6, lambda x: (np.abs(x) < 3) / 6),
    cpu=(_hardsigmoid, _hardsigmoid_slope),
    saves="x",
    flops=4,
    kinks=(-3, 3),
)


def _hardswish(x):
    number = type(x)
    return x * clip(x + number(3), number(0), number(6)) * number(1 / 6)


def _hardswish_slope(x):
    number = type(x)
    return number(0) if x <= -3 else number(1) if x >= 3 else (x + x + number(3)) * number(1 / 6)


hardswish = _op(
    "hardswish",
    reference=(lambda x: x * np.clip(x + 3, 0, 6) / 6, lambda x: np.where(x <= -3, 0, np.where(x >= 3, 1, (2 * x + 3) / 6))),
    cpu=(_hardswish, _hardswish_slope),
    saves="x",
    flops=5,
    kinks=(-3, 3),
)
