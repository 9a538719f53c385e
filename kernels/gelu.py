"""The Gaussian error linear unit (Hendrycks and Gimpel, 1606.08415); Φ is the normal CDF (`cpu/math.py`).

y = x·Φ(x)
dx = dy·(Φ(x) + x·Φ'(x))
"""

from __future__ import annotations

import math
from math import prod

import numpy as np

from .core.op import Cost, Implementation, Op
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.math import gelu_erf, gelu_tanh
from .cpu.strided import bands_for
from .cuda.gemm import gelu_gradient
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

_source = Source("gelu")


APPROXIMATIONS = ("none", "tanh")


def gelu_terms(x: np.ndarray, approximate: str) -> tuple[np.ndarray, np.ndarray]:
    """Φ(x) and Φ'(x), or their tanh approximations."""
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


def forward_cpu(y, x, approximate):
    launch(_gelu, bands_for(x.size), y.reshape(-1), x.reshape(-1), approximate == "tanh")


def backward_cpu(dx, dy, x, approximate):
    launch(_gelu_backward, bands_for(x.size), dx.reshape(-1), dy.reshape(-1), x.reshape(-1), approximate == "tanh")


def forward_cuda(y, x, approximate):
    width = vector_width(x.size, y, x)
    launch(_source("gelu_forward", x.dtype, width, approximate == "tanh"), grid_for(x.size // width), y, x, x.size)


def backward_cuda(dx, dy, x, approximate):
    gelu_gradient(dx, None, dy, x, approximate == "tanh")


gelu_backward = Implementation(gelu_backward_reference, backward_cpu, backward_cuda)

gelu = Op(
    "gelu",
    shapes={"x": "B N C"},
    accepts={"x": "*"},
    constants={"approximate": "none"},
    choices={"approximate": APPROXIMATIONS},
    outputs=lambda x, approximate: {"y": x},
    forward=Implementation(gelu_reference, forward_cpu, forward_cuda),
    backward=gelu_backward,
    saves=("x",),
    cases=[dict(B=2, N=3, C=5), dict(B=2, N=3, C=5, approximate="tanh"), dict(B=1, N=1, C=1), dict(B=64, N=65, C=768)],
    cost=lambda x, approximate: Cost(forward=30 * prod(x), backward=35 * prod(x)),
    values={"x": lambda rng, shape, sizes: rng.normal(0, 3, shape)},
)
