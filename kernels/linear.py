"""A fully connected layer with fused bias, activation and residual addition.

    y = residual + f(x·wᵀ + bias)           with p = x·wᵀ + bias and f the identity or GELU
    dp = dy·f'(p),  dx = dp·w,  dw = dpᵀ·x,  dbias = Σ dp,  dresidual = dy

Letters: B batch, T tokens, C channels in, O channels out.
"""

from __future__ import annotations

from math import prod

import numpy as np

from .core import epilogue
from .core.arrays import empty_like
from .core.devices import device_of
from .core.op import Cost, Float32Output, Implementation, Op, require
from .cpu import primitives as cpu
from .cuda import primitives as cuda
from .gelu import gelu_backward, gelu_backward_reference, gelu_reference

ACTIVATIONS = {"none": 0, "gelu": epilogue.GELU, "gelu_tanh": epilogue.GELU | epilogue.TANH}
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def forward_reference(y, pre, x, weight, bias, residual, activation, precise):
    p = x @ weight.T if bias is None else x @ weight.T + bias  # (B, T, O)
    y[...] = p
    if pre is not None:
        pre[...] = p
    if activation != "none":
        gelu_reference(y, p, APPROXIMATE[activation])
    if residual is not None:
        y += residual


def backward_reference(dx, dweight, dbias, dy, weight_sum, x, weight, pre, activation, precise):
    dp = dy  # (B, T, O)
    if activation != "none":
        dp = np.empty_like(dy)
        gelu_backward_reference(dp, dy, pre, APPROXIMATE[activation])
    rows = dp.reshape(-1, dp.shape[-1])  # (B·T, O)
    if dx is not None:
        dx[...] = dp @ weight
    if dweight is not None:
        gradient = rows.T @ x.reshape(-1, x.shape[-1])
        dweight[...] = gradient if weight_sum is None else gradient + weight_sum
    if dbias is not None:
        dbias[...] = rows.sum(0)


def _rows(x):
    return None if x is None else x.reshape(-1, x.shape[-1])


def forward(on, y, pre, x, weight, bias, residual, activation, precise):
    flags = ACTIVATIONS[activation]
    flags |= epilogue.BIAS_COLUMN if bias is not None else 0
    flags |= epilogue.RESIDUAL if residual is not None else 0
    arrays = {"bias": bias, "pre": _rows(pre), "extra": _rows(residual)}
    on.gemm(_rows(y), _rows(x), weight, transpose_b=True, flags=flags, exact=precise, **arrays)


def backward(on, dx, dweight, dbias, dy, weight_sum, x, weight, pre, activation, precise):
    dp = on.astype(dy, x.dtype)
    if activation != "none":
        dp = empty_like(dy)
        gelu_backward.on(device_of(dy))(dp, dy, pre, APPROXIMATE[activation])
    if dx is not None:
        on.gemm(_rows(dx), _rows(dp), weight)
    on.parameter_gradients(dweight, dbias, _rows(dp), _rows(x), weight_sum)


def _linear_outputs(x, weight, bias, residual, activation, precise):
    if precise and (activation != "none" or residual is not None):
        raise ValueError("linear: a precise result has no activation and no residual")
    if x[-1] != weight[1]:
        raise ValueError(f"linear: x has {x[-1]} channels, the weight of shape {weight} takes {weight[1]}")
    y = (*x[:-1], weight[0])
    require("linear", bias=(bias, weight[:1]), residual=(residual, y))
    return {"y": Float32Output(y) if precise else y, "pre": None if activation == "none" else y}


linear = Op(
    "linear",
    shapes={"x": "B T C", "weight": "O C", "bias": "O", "residual": "B T O"},
    constants={"activation": "none", "precise": False},
    choices={"activation": ACTIVATIONS},
    accepts={"x": "... C", "residual": "... O"},
    outputs=_linear_outputs,
    forward=Implementation.composed(forward_reference, forward, cpu, cuda),
    backward=Implementation.composed(backward_reference, backward, cpu, cuda),
    saves=("x", "weight", "pre"),
    backward_only=("pre",),
    parameters=("weight", "bias"),
    bf16_parameters=("weight", "bias"),
    accumulates=("weight",),
    gradient_aliases={"residual": "dy"},
    cases=[
        dict(B=2, T=5, C=7, O=3),
        dict(B=2, T=5, C=7, O=3, bias=None, residual=None),
        dict(B=3, T=37, C=40, O=50, activation="gelu"),
        dict(B=2, T=9, C=33, O=19, activation="gelu_tanh", residual=None),
        dict(B=3, T=1, C=40, O=10, residual=None, precise=True),
        dict(B=64, T=65, C=192, O=768, activation="gelu", residual=None),
        dict(B=64, T=65, C=768, O=192),
    ],
    cost=lambda x, weight, *_: Cost.of_products(prod(x) * weight[0]),
)
