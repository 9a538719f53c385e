"""The first tokens of a transformer: a class token before the patches, and the position embedding (2010.11929, equation 1).

    y[b, 0] = token + positions[0],    y[b, 1 + n] = x[b, n] + positions[1 + n]
    dx[b, n] = dy[b, 1 + n],           dpositions = Σ dy over b,    dtoken = Σ dy[b, 0] over b = dpositions[0]

The token is rounded to the type of x before it is added. Letters: B batch, N patches, C channels.
"""

from __future__ import annotations

from math import prod

from .core.arrays import empty
from .core.devices import runtime
from .core.dtypes import accumulator_dtype
from .core.op import Cost, Implementation, Op, require
from .core.recording import launch
from .core.strides import ADD, broadcast_strides, strides
from .cpu import primitives as cpu
from .cuda import primitives as cuda
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

_source = Source("class_token")


def forward_reference(y, x, token, positions):
    y[:, :1] = token
    y[:, 1:] = x
    y += positions


def backward_reference(dx, dtoken, dpositions, dy):
    if dx is not None:
        dx[...] = dy[:, 1:]
    if dtoken is not None:
        dtoken[...] = dy[:, :1].sum(0, keepdims=True)
    if dpositions is not None:
        dpositions[...] = dy.sum(0, keepdims=True)


def forward_cpu(y, x, token, positions):
    first, steps = (len(x), 1, x.shape[2]), strides(y.shape)
    cpu.copy(y, token, first, steps, broadcast_strides(token.shape, first))
    cpu.copy(y, x, x.shape, steps, strides(x.shape), y_start=x.shape[2])
    cpu.combine(ADD, y, y, positions)


def backward_cpu(dx, dtoken, dpositions, dy):
    B, _, C = dy.shape
    if dpositions is not None:
        cpu.sum_into(dpositions, dy)
    if dtoken is not None:
        first = empty((B, 1, C), dtoken.dtype)
        cpu.copy(first, dy, first.shape, strides(first.shape), strides(dy.shape))
        cpu.sum_into(dtoken, first)
    if dx is not None:
        cpu.copy(dx, dy, dx.shape, strides(dx.shape), strides(dy.shape), x_start=C)


def forward_cuda(y, x, token, positions):
    C = x.shape[2]
    width = vector_width(C, y, x, token, positions)
    kernel = _source("class_token_forward", y.dtype, token.dtype, positions.dtype, width)
    launch(kernel, grid_for(y.size // width), y, x, token, positions, y.size, y.size // len(y), C)


def backward_cuda(dx, dtoken, dpositions, dy):
    (B, _, C), row = dy.shape, dy.size // len(dy)
    width = vector_width(C, *(m for m in (dx, dy) if m is not None))
    parts = max(1, min(B // 4, runtime().multiprocessors * 1024 // (row // width)))
    partial = None
    if dtoken is not None or dpositions is not None:
        partial = empty((parts, *dy.shape[1:]), accumulator_dtype(dy.dtype), "cuda")
    launch(_source("class_token_backward", dy.dtype, width), grid_for(parts * row // width), dx, partial, dy, B, row, C, parts)
    if partial is not None:
        exact = dpositions is not None and dpositions.dtype == partial.dtype
        total = dpositions if exact else empty((1, *dy.shape[1:]), partial.dtype, "cuda")
        cuda.sum_into(total, partial)
        if dpositions is not None and not exact:
            cuda.convert(dpositions, total)
        if dtoken is not None:
            cuda.copy(dtoken, total, (C,), (1,), (1,))


def _outputs(x, token, positions):
    B, N, C = x
    require("class_token", token=(token, (1, 1, C)), positions=(positions, (1, 1 + N, C)))
    return {"y": (B, 1 + N, C)}


class_token = Op(
    "class_token",
    shapes={"x": "B N C", "token": "1 1 C", "positions": "1 1+N C"},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    parameters=("token", "positions"),
    cases=[dict(B=2, N=4, C=5), dict(B=37, N=9, C=24), dict(B=1, N=1, C=8), dict(B=64, N=64, C=192)],
    cost=lambda x, token, positions: Cost(forward=prod(x), backward=prod(x)),
)
