"""Layer normalisation over the last axis, alone and fused with a preceding residual addition (Ba et al., 1607.06450).

    m = mean(x),  r = 1 / sqrt(mean((x - m)²) + eps),  h = (x - m)·r,  y = h·w + b

With g = dy·w, since h depends on x directly, through m and through r:

    dx = r·(g - mean(g) - h·mean(g·h)),     dw = Σ dy·h,     db = Σ dy       (sums over rows)

`layernorm` adds dx to the running gradient of x, which comes from the skip connection. `add_layernorm` computes s = x + branch and
y = LN(s) in one pass; s is also a result, with gradient ds, so dx = dbranch = ds + the dx above.

Letters: R rows, C channels.
"""

from __future__ import annotations

from itertools import chain
from math import prod

import numpy as np

from .core.arrays import empty, empty_like
from .core.op import Cost, Float32Output, Implementation, Op, require
from .core.recording import launch, launch_late
from .cpu.kernel import kernel
from .cpu.run import threads
from .cpu.strided import fill
from .cuda.kernel import Grid, Source, blocks_for
from .cuda.strided import vector_width

BLOCKS = 64  # partial sums over rows: a constant, so that no result depends on the number of threads


# ---------------------------------------------------------------------------------------------------------------- reference
def forward_reference(y, mean, rstd, x, w, b, eps):
    mean[...] = x.mean(-1)
    rstd[...] = 1 / np.sqrt(x.var(-1) + eps)
    y[...] = (x - mean[..., None]) * rstd[..., None] * w + b


def backward_reference(dx, dw, db, dy, dx_sum, x, w, mean, rstd, eps):
    h = (x - mean[..., None]) * rstd[..., None]  # (..., C)
    g = dy * w
    rows = tuple(range(x.ndim - 1))
    if dx is not None:
        gradient = rstd[..., None] * (g - g.mean(-1, keepdims=True) - h * (g * h).mean(-1, keepdims=True))
        dx[...] = gradient if dx_sum is None else gradient + dx_sum
    if dw is not None:
        dw[...] = (dy * h).sum(rows)
    if db is not None:
        db[...] = dy.sum(rows)


def add_forward_reference(s, y, mean, rstd, x, branch, w, b, eps):
    s[...] = x + branch
    forward_reference(y, mean, rstd, s, w, b, eps)


def add_backward_reference(dx, dw, db, ds, dy, s, w, mean, rstd, eps):
    if dy is None:
        dy = np.zeros_like(s)
    backward_reference(dx, dw, db, dy, ds, s, w, mean, rstd, eps)


# ---------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _forward(band, bands, y, s, mean, rstd, x, branch, w, b, eps, add):
    R, C = x.shape
    number = x.dtype.type
    for i in range(band * R // bands, (band + 1) * R // bands):
        if add:
            for j in range(C):
                s[i, j] = x[i, j] + branch[i, j]
        total = number(0)
        for j in range(C):
            total += s[i, j]
        m = total / number(C)
        squares = number(0)
        for j in range(C):
            squares += (s[i, j] - m) * (s[i, j] - m)
        r = number(1) / np.sqrt(squares / number(C) + number(eps))
        mean[i] = m
        rstd[i] = r
        for j in range(C):
            y[i, j] = (s[i, j] - m) * r * w[j] + b[j]


@kernel
def _backward(band, bands, dx, partial, dy, dx_sum, x, w, mean, rstd, add):
    R, C = x.shape
    number = x.dtype.type
    dw, db = partial[band, 0], partial[band, 1]  # this band's partial sums
    dw[:] = 0
    db[:] = 0
    for i in range(band * R // bands, (band + 1) * R // bands):
        m, r = mean[i], rstd[i]
        total = number(0)
        product = number(0)
        for j in range(C):
            h = (x[i, j] - m) * r
            g = dy[i, j] * w[j]
            total += g
            product += g * h
            dw[j] += dy[i, j] * h
            db[j] += dy[i, j]
        total /= number(C)
        product /= number(C)
        if add:
            for j in range(C):
                dx[i, j] = dx_sum[i, j] + r * (dy[i, j] * w[j] - total - (x[i, j] - m) * r * product)
        else:
            for j in range(C):
                dx[i, j] = r * (dy[i, j] * w[j] - total - (x[i, j] - m) * r * product)


@kernel
def _sum_partial(band, bands, dw, db, partial):
    dw[:] = 0
    db[:] = 0
    for part in range(partial.shape[0]):
        for j in range(len(dw)):
            dw[j] += partial[part, 0, j]
            db[j] += partial[part, 1, j]


def forward_cpu(y, mean, rstd, x, w, b, eps):
    C = x.shape[-1]
    rows = x.reshape(-1, C)  # (R, C)
    launch(_forward, threads(), y.reshape(-1, C), rows, mean.reshape(-1), rstd.reshape(-1), rows, rows, w, b, eps, False)


def add_forward_cpu(s, y, mean, rstd, x, branch, w, b, eps):
    C = x.shape[-1]
    launch(
        _forward,
        threads(),
        y.reshape(-1, C),
        s.reshape(-1, C),
        mean.reshape(-1),
        rstd.reshape(-1),
        x.reshape(-1, C),
        branch.reshape(-1, C),
        w,
        b,
        eps,
        True,
    )


def backward_cpu(dx, dw, db, dy, dx_sum, x, w, mean, rstd, eps):
    C = x.shape[-1]
    rows = x.reshape(-1, C)  # (R, C)
    dx, dw, db = (empty_like(a) if d is None else d for d, a in ((dx, x), (dw, w), (db, w)))
    partial = empty((max(1, min(BLOCKS, len(rows))), 2, C), w.dtype)
    running = dy if dx_sum is None else dx_sum
    launch(
        _backward,
        len(partial),
        dx.reshape(-1, C),
        partial,
        dy.reshape(-1, C),
        running.reshape(-1, C),
        rows,
        w,
        mean.reshape(-1),
        rstd.reshape(-1),
        dx_sum is not None,
    )
    launch(_sum_partial, 1, dw, db, partial)


def add_backward_cpu(dx, dw, db, ds, dy, s, w, mean, rstd, eps):
    if dy is None:
        dy = empty_like(s)
        fill(dy, 0.0)
    backward_cpu(dx, dw, db, dy, ds, s, w, mean, rstd, eps)


# --------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("layernorm")
JOINED = 16  # layers whose dw and db one launch sums
ROW_WARPS = 4  # warps per block, each with its own rows
LANE_ELEMENTS = 32  # maximal number of elements of a row that a lane holds in registers


def _tiling(C, *arrays):
    """(elements per vector, vectors of a row per lane; 0: they do not fit into registers, and the row is read again)."""
    width = vector_width(C, *(a for a in arrays if a is not None))
    vectors = -(-C // (32 * width))
    return width, vectors if vectors * width <= LANE_ELEMENTS else 0


def _forward_cuda(y, s, mean, rstd, x, branch, w, b, eps):
    C = x.shape[-1]
    R = x.size // C
    grid = Grid(blocks_for(R, ROW_WARPS, most=8), 32 * ROW_WARPS)
    launch(_source("layernorm_forward", x.dtype, *_tiling(C, y, s, x, branch)), grid, y, s, mean, rstd, x, branch, w, b, R, C, float(eps))


def forward_cuda(y, mean, rstd, x, w, b, eps):
    _forward_cuda(y, None, mean, rstd, x, None, w, b, eps)


def add_forward_cuda(s, y, mean, rstd, x, branch, w, b, eps):
    _forward_cuda(y, s, mean, rstd, x, branch, w, b, eps)


def backward_cuda(dx, dw, db, dy, dx_sum, x, w, mean, rstd, eps):
    C = x.shape[-1]
    R = x.size // C
    width, vectors = _tiling(C, dx, dy, dx_sum, x)
    grid = Grid(blocks_for(R, ROW_WARPS, most=4), 32 * ROW_WARPS)
    parts = grid.blocks if vectors else grid.blocks * ROW_WARPS
    partial = None if dw is None and db is None else empty((parts, 2, C), w.dtype, "cuda")
    launch(_source("layernorm_backward", x.dtype, width, vectors), grid, dx, partial, dy, dx_sum, x, w, mean, rstd, R, C)
    if partial is not None:
        launch_late(_sum_parts, dw, db, partial, parts, C, outputs=2)


def _sum_parts(items):
    """dw, db = the sums of the parts, for each (dw, db, partial, parts, C)."""
    for i in range(0, len(items), JOINED):
        some = items[i : i + JOINED]
        blocks = sum(-(-2 * C // 32) for *_, C in some)
        absent = [(None, None, None, 0, 0)] * (JOINED - len(some))
        launch(_source("layernorm_parameters", some[0][2].dtype), Grid(blocks, 256), *chain(*some, *absent))


def add_backward_cuda(dx, dw, db, ds, dy, s, w, mean, rstd, eps):
    backward_cuda(dx, dw, db, dy, ds, s, w, mean, rstd, eps)


# --------------------------------------------------------------------------------------------------------------------- spec
def _outputs(x, w, b, eps):
    require("layernorm", w=(w, x[-1:]), b=(b, x[-1:]))
    return {"y": x, "mean": Float32Output(x[:-1]), "rstd": Float32Output(x[:-1])}


def _add_outputs(x, branch, w, b, eps):
    require("add_layernorm", branch=(branch, x))
    return {"s": x, **_outputs(x, w, b, eps)}


layernorm = Op(
    "layernorm",
    shapes={"x": "B N C", "w": "C", "b": "C"},
    accepts={"x": "... C"},
    constants={"eps": 1e-6},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    saves=("x", "w", "mean", "rstd"),
    parameters=("w", "b"),
    accumulates=("x",),
    cases=[dict(B=2, N=5, C=8), dict(B=64, N=65, C=192)],
    cost=lambda x, w, b, eps: Cost(forward=8 * prod(x), backward=14 * prod(x), macs=5 * prod(x)),
)

add_layernorm = Op(
    "add_layernorm",
    shapes={"x": "B N C", "branch": "B N C", "w": "C", "b": "C"},
    accepts={"x": "... C", "branch": "... C"},
    constants={"eps": 1e-6},
    outputs=_add_outputs,
    forward=Implementation(add_forward_reference, add_forward_cpu, add_forward_cuda),
    backward=Implementation(add_backward_reference, add_backward_cpu, add_backward_cuda),
    results=("s", "y"),
    saves=("s", "w", "mean", "rstd"),
    parameters=("w", "b"),
    gradient_aliases={"branch": "dx"},
    cases=[dict(B=2, N=5, C=8), dict(B=64, N=65, C=192)],
    cost=lambda x, branch, w, b, eps: Cost(forward=9 * prod(x), backward=15 * prod(x), macs=5 * prod(x)),
)
