"""The MLPs of transformers and mixers, one op each (2105.01601, equation 1; 2010.11929, equation 3).

    channel mixing:  h = x·w1ᵀ + b1,   y = residual + gelu(h)·w2ᵀ + b2            over the channels of each token
    token mixing:    h = w1·x + b1,    y = residual + w2·gelu(h) + b2             over the tokens of each channel, per sample

y has O channels (tokens), as w2 has rows. Token mixing is also a 1×1 convolution of an image with N channels, and its products read x in
place: a weight times a matrix, without a transpose. Backward, with a = gelu(h):

    channel:  dh = (dy·w2)·gelu'(h),   dw2 = dyᵀ·a,   dw1 = dhᵀ·x,   dx = dh·w1,   db = Σ over rows
    token:    dh = (w2ᵀ·dy)·gelu'(h),  dw2 = Σ dy·aᵀ, dw1 = Σ dh·xᵀ, dx = w1ᵀ·dh,  db = Σ over samples and channels

Only h is saved: the epilogue of the product for dh recomputes a, at no cost beyond the store. dresidual = dy.

Letters: B batch, N tokens, C channels, F hidden size, O outputs.
"""

from __future__ import annotations

from math import prod

from .core import epilogue
from .core.arrays import empty, empty_like
from .core.devices import device_of
from .core.op import Cost, Implementation, Op, require
from .cpu import primitives as cpu
from .cuda import primitives as cuda
from .gelu import APPROXIMATIONS, gelu_backward_reference, gelu_reference


# -------------------------------------------------------------------------------------------------------------------- reference
def _gelu(h, approximate):
    a = h.copy()
    gelu_reference(a, h, approximate)
    return a


def channel_forward_reference(y, h, x, w1, b1, w2, b2, residual, approximate):
    p = x @ w1.T + b1  # (B, N, F)
    if h is not None:
        h[...] = p
    y[...] = _gelu(p, approximate) @ w2.T + b2
    if residual is not None:
        y += residual


def token_forward_reference(y, h, x, w1, b1, w2, b2, residual, approximate):
    p = w1 @ x + b1[:, None]  # (B, F, C)
    if h is not None:
        h[...] = p
    y[...] = w2 @ _gelu(p, approximate) + b2[:, None]
    if residual is not None:
        y += residual


def _set(gradients, values, running):
    for gradient, value, accumulated in zip(gradients, values, running):
        if gradient is not None:
            gradient[...] = value if accumulated is None else accumulated + value


def channel_backward_reference(dx, dw1, db1, dw2, db2, dy, w1_sum, w2_sum, x, w1, w2, h, approximate):
    dh = h.copy()  # (B, N, F)
    gelu_backward_reference(dh, dy @ w2, h, approximate)
    dy_rows, dh_rows, x_rows, a_rows = (m.reshape(-1, m.shape[-1]) for m in (dy, dh, x, _gelu(h, approximate)))
    _set(
        (dx, dw1, db1, dw2, db2),
        (dh @ w1, dh_rows.T @ x_rows, dh_rows.sum(0), dy_rows.T @ a_rows, dy_rows.sum(0)),
        (None, w1_sum, None, w2_sum, None),
    )


def token_backward_reference(dx, dw1, db1, dw2, db2, dy, w1_sum, w2_sum, x, w1, w2, h, approximate):
    dh = h.copy()  # (B, F, C)
    gelu_backward_reference(dh, w2.T @ dy, h, approximate)
    dw1_each, dw2_each = dh @ x.swapaxes(1, 2), dy @ _gelu(h, approximate).swapaxes(1, 2)
    _set(
        (dx, dw1, db1, dw2, db2),
        (w1.T @ dh, dw1_each.sum(0), dh.sum((0, 2)), dw2_each.sum(0), dy.sum((0, 2))),
        (None, w1_sum, None, w2_sum, None),
    )


# ---------------------------------------------------------------------------------------------------------------------- kernels
TANH = {"none": 0, "tanh": epilogue.TANH}


def channel_forward(on, y, h, x, w1, b1, w2, b2, residual, approximate):
    rows, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    a = empty((len(rows), len(w1)), y.dtype, device_of(y))  # (B·N, F)
    hidden = None if h is None else h.reshape(a.shape)
    extra = None if residual is None else residual.reshape(out.shape)
    on.gemm(a, rows, w1, transpose_b=True, flags=epilogue.BIAS_COLUMN | epilogue.GELU | TANH[approximate], bias=b1, pre=hidden)
    on.gemm(out, a, w2, transpose_b=True, flags=epilogue.BIAS_COLUMN | (0 if extra is None else epilogue.RESIDUAL), bias=b2, extra=extra)


def token_forward(on, y, h, x, w1, b1, w2, b2, residual, approximate):
    a = empty((len(x), len(w1), x.shape[2]), y.dtype, device_of(y))  # (B, F, C)
    on.gemm(a, w1, x, flags=epilogue.BIAS_ROW | epilogue.GELU | TANH[approximate], bias=b1, pre=h)
    on.gemm(y, w2, a, flags=epilogue.BIAS_ROW | (0 if residual is None else epilogue.RESIDUAL), bias=b2, extra=residual)


def channel_backward(on, dx, dw1, db1, dw2, db2, dy, w1_sum, w2_sum, x, w1, w2, h, approximate):
    dy, x, h = (m.reshape(-1, m.shape[-1]) for m in (dy, x, h))
    dh, a = empty_like(h), empty_like(h)  # (B·N, F)
    on.gemm(dh, dy, w2, flags=epilogue.GELU_GRADIENT | TANH[approximate], pre=h, extra=a)
    on.parameter_gradients(dw2, db2, dy, a, w2_sum)
    on.parameter_gradients(dw1, db1, dh, x, w1_sum)
    if dx is not None:
        on.gemm(dx.reshape(x.shape), dh, w1)


def token_backward(on, dx, dw1, db1, dw2, db2, dy, w1_sum, w2_sum, x, w1, w2, h, approximate):
    dh, a = empty_like(h), empty_like(h)  # (B, F, C)
    on.gemm(dh, w2, dy, transpose_a=True, flags=epilogue.GELU_GRADIENT | TANH[approximate], pre=h, extra=a)
    if dw2 is not None:
        on.gemm(dw2, dy, a, transpose_b=True, sum_batch=True, running=w2_sum)
    if db2 is not None:
        on.row_sums(db2, dy)
    if dw1 is not None:
        on.gemm(dw1, dh, x, transpose_b=True, sum_batch=True, running=w1_sum)
    if db1 is not None:
        on.row_sums(db1, dh)
    if dx is not None:
        on.gemm(dx, w1, dh, transpose_a=True)


# ------------------------------------------------------------------------------------------------------------------------- spec
def _check(name, length, y, w1, b1, w2, b2, residual):
    hidden, out = w1[0], w2[0]
    require(name, w1=(w1, (hidden, length)), b1=(b1, (hidden,)), w2=(w2, (out, hidden)), b2=(b2, (out,)), residual=(residual, y))


def _channel_outputs(x, w1, b1, w2, b2, residual, approximate):
    y = (*x[:-1], w2[0])
    _check("channel_mixing", x[-1], y, w1, b1, w2, b2, residual)
    return {"y": y, "h": (*x[:-1], w1[0])}


def _token_outputs(x, w1, b1, w2, b2, residual, approximate):
    if len(x) != 3:
        raise ValueError(f"token_mixing: x has shape {x}, not (B, N, C)")
    y = (x[0], w2[0], x[2])
    _check("token_mixing", x[1], y, w1, b1, w2, b2, residual)
    return {"y": y, "h": (x[0], w1[0], x[2])}


def _cost(x, w1, b1, w2, *_):
    return Cost.of_products(prod(x) // w1[1] * w1[0] * (w1[1] + w2[0]))


channel_mixing = Op(
    "channel_mixing",
    shapes={"x": "B N C", "w1": "F C", "b1": "F", "w2": "O F", "b2": "O", "residual": "B N O"},
    accepts={"x": "... C", "residual": "... O"},
    constants={"approximate": "none"},
    choices={"approximate": APPROXIMATIONS},
    outputs=_channel_outputs,
    forward=Implementation.composed(channel_forward_reference, channel_forward, cpu, cuda),
    backward=Implementation.composed(channel_backward_reference, channel_backward, cpu, cuda),
    saves=("x", "w1", "w2", "h"),
    backward_only=("h",),
    parameters=("w1", "b1", "w2", "b2"),
    bf16_parameters=("w1", "b1", "w2", "b2"),
    accumulates=("w1", "w2"),
    gradient_aliases={"residual": "dy"},
    cases=[
        dict(B=2, N=5, C=7, F=11, O=7),
        dict(B=3, N=9, C=20, F=33, O=6, residual=None, approximate="tanh"),
        dict(B=64, N=65, C=192, F=768, O=192),
    ],
    cost=_cost,
)

token_mixing = Op(
    "token_mixing",
    shapes={"x": "B N C", "w1": "F N", "b1": "F", "w2": "O F", "b2": "O", "residual": "B O C"},
    constants={"approximate": "none"},
    choices={"approximate": APPROXIMATIONS},
    outputs=_token_outputs,
    forward=Implementation.composed(token_forward_reference, token_forward, cpu, cuda),
    backward=Implementation.composed(token_backward_reference, token_backward, cpu, cuda),
    saves=("x", "w1", "w2", "h"),
    backward_only=("h",),
    parameters=("w1", "b1", "w2", "b2"),
    bf16_parameters=("w1", "b1", "w2", "b2"),
    accumulates=("w1", "w2"),
    gradient_aliases={"residual": "dy"},
    cases=[
        dict(B=2, N=5, C=7, F=11, O=5),
        dict(B=3, N=9, C=20, F=33, O=4, residual=None, approximate="tanh"),
        dict(B=64, N=64, C=256, F=128, O=64),
    ],
    cost=_cost,
)
