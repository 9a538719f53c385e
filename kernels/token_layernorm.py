"""Layer normalisation over the tokens of each channel, unlike `layernorm`, over the channels of each token (2105.02723, section 2).

    m = mean(x),  r = 1 / sqrt(mean((x - m)²) + eps),  h = (x - m)·r,  y = h·w + b         means over N; w, b one entry per token

With g = dy·w:

    dx = r·(g - mean(g) - h·mean(g·h)),     dw = Σ dy·h,     db = Σ dy                     dw, db: sums over samples and channels

All loops run along WIDTH adjacent channels: nothing is transposed, and the data of a block of channels stays in the L1 cache. dx is added
to the running gradient of x, which comes from the skip connection.

Letters: B batch, N tokens, C channels.
"""

from __future__ import annotations

from math import prod

import numpy as np

from .core.arrays import empty, empty_like
from .core.op import Cost, Float32Output, Implementation, Op, require
from .core.recording import launch
from .cpu import strided as cpu
from .cpu.kernel import kernel
from .cpu.run import threads
from .cuda import strided as cuda
from .cuda.kernel import Grid, Source
from .cuda.strided import vector_width

WIDTH = 64  # channels in a block
BLOCKS = 64  # partial sums of dw and db: a constant, so that no result depends on the number of threads


# ---------------------------------------------------------------------------------------------------------------- reference
def forward_reference(y, mean, rstd, x, w, b, eps):
    mean[...] = x.mean(1)
    rstd[...] = 1 / np.sqrt(x.var(1) + eps)
    y[...] = (x - mean[:, None]) * rstd[:, None] * w[:, None] + b[:, None]


def backward_reference(dx, dw, db, dy, dx_sum, x, w, mean, rstd, eps):
    h = (x - mean[:, None]) * rstd[:, None]  # (B, N, C)
    g = dy * w[:, None]
    if dx is not None:
        gradient = rstd[:, None] * (g - g.mean(1, keepdims=True) - h * (g * h).mean(1, keepdims=True))
        dx[...] = gradient if dx_sum is None else gradient + dx_sum
    if dw is not None:
        dw[...] = (dy * h).sum((0, 2))
    if db is not None:
        db[...] = dy.sum((0, 2))


# ---------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _forward(band, bands, y, mean, rstd, x, w, b, eps):
    B, N, C = x.shape
    number = x.dtype.type
    blocks = (C + WIDTH - 1) // WIDTH
    for item in range(band * B * blocks // bands, (band + 1) * B * blocks // bands):
        s, start = item // blocks, item % blocks * WIDTH
        stop = min(C, start + WIDTH)
        for c in range(start, stop):
            mean[s, np.uint64(c)] = 0
            rstd[s, np.uint64(c)] = 0
        for n in range(N):
            for c in range(start, stop):
                mean[s, np.uint64(c)] += x[s, n, np.uint64(c)]
        for c in range(start, stop):
            mean[s, np.uint64(c)] /= number(N)
        for n in range(N):  # rstd temporarily holds the sum of squares
            for c in range(start, stop):
                rstd[s, np.uint64(c)] += (x[s, n, np.uint64(c)] - mean[s, np.uint64(c)]) ** 2
        for c in range(start, stop):
            rstd[s, np.uint64(c)] = number(1) / np.sqrt(rstd[s, np.uint64(c)] / number(N) + number(eps))
        for n in range(N):
            scale, shift = w[n], b[n]
            for c in range(start, stop):
                y[s, n, np.uint64(c)] = (x[s, n, np.uint64(c)] - mean[s, np.uint64(c)]) * rstd[s, np.uint64(c)] * scale + shift


@kernel
def _backward(band, bands, dx, dw, db, totals, products, dy, dx_sum, x, w, mean, rstd, add):
    B, N, C = x.shape  # dw, db (bands, N): this band's share
    number = x.dtype.type
    total, product = totals[band], products[band]  # (WIDTH,)
    blocks = (C + WIDTH - 1) // WIDTH
    dw[band, :] = 0
    db[band, :] = 0
    for item in range(band * B * blocks // bands, (band + 1) * B * blocks // bands):
        s, start = item // blocks, item % blocks * WIDTH
        width = min(WIDTH, C - start)
        total[:] = 0
        product[:] = 0
        for n in range(N):
            scale = w[n]
            for j in range(width):  # Σ g and Σ g·(x - m)
                c = np.uint64(start + j)
                g = dy[s, n, c] * scale
                total[np.uint64(j)] += g
                product[np.uint64(j)] += g * (x[s, n, c] - mean[s, c])
            weight, bias = number(0), number(0)
            for j in range(width):  # separate from the loop above, which then needs fewer tests for overlapping arrays
                c = np.uint64(start + j)
                weight += dy[s, n, c] * (x[s, n, c] - mean[s, c]) * rstd[s, c]
                bias += dy[s, n, c]
            dw[band, n] += weight
            db[band, n] += bias
        for j in range(width):
            total[j] /= number(N)
            product[j] *= rstd[s, start + j] ** 2 / number(N)
        for n in range(N):
            scale = w[n]
            if add:
                for j in range(width):
                    c = np.uint64(start + j)
                    centred = dy[s, n, c] * scale - total[np.uint64(j)] - (x[s, n, c] - mean[s, c]) * product[np.uint64(j)]
                    dx[s, n, c] = dx_sum[s, n, c] + rstd[s, c] * centred
            else:
                for j in range(width):
                    c = np.uint64(start + j)
                    centred = dy[s, n, c] * scale - total[np.uint64(j)] - (x[s, n, c] - mean[s, c]) * product[np.uint64(j)]
                    dx[s, n, c] = rstd[s, c] * centred


def forward_cpu(y, mean, rstd, x, w, b, eps):
    launch(_forward, threads(), y, mean, rstd, x, w, b, eps)


def backward_cpu(dx, dw, db, dy, dx_sum, x, w, mean, rstd, eps):
    B, N, C = x.shape
    bands = max(1, min(BLOCKS, B * (-(-C // WIDTH))))
    shares = empty((2, bands, N), w.dtype)
    sums = empty((2, bands, WIDTH), w.dtype)
    launch(
        _backward,
        bands,
        empty_like(x) if dx is None else dx,
        *shares,
        *sums,
        dy,
        dy if dx_sum is None else dx_sum,
        x,
        w,
        mean,
        rstd,
        dx_sum is not None,
    )
    for gradient, share in zip((dw, db), shares):
        if gradient is not None:
            cpu.sum_into(gradient, share)


# --------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("token_layernorm")


def _tiling(*arrays):
    """(elements per vector, blocks per sample, the grid)."""
    B, _, C = arrays[0].shape
    width = vector_width(C, *(a for a in arrays if a is not None))
    across = -(-C // (32 * width))
    return width, across, Grid(B * across, 256)


def forward_cuda(y, mean, rstd, x, w, b, eps):
    _, N, C = x.shape
    width, across, grid = _tiling(y, x)
    launch(_source("token_layernorm_forward", x.dtype, width), grid, y, mean, rstd, x, w, b, across, N, C, float(eps))


def backward_cuda(dx, dw, db, dy, dx_sum, x, w, mean, rstd, eps):
    _, N, C = x.shape
    width, across, grid = _tiling(x, dx, dy, dx_sum)
    shares = (None, None) if dw is None and db is None else empty((2, grid.blocks, N), w.dtype, "cuda")
    launch(_source("token_layernorm_backward", x.dtype, width), grid, dx, shares[0], shares[1], dy, dx_sum, x, w, mean, rstd, across, N, C)
    for gradient, share in zip((dw, db), shares):
        if gradient is not None:
            cuda.sum_into(gradient, share)


# --------------------------------------------------------------------------------------------------------------------- spec
def _outputs(x, w, b, eps):
    if len(x) != 3:
        raise ValueError(f"token_layernorm: x has shape {x}, not (B, N, C)")
    B, N, C = x
    require("token_layernorm", w=(w, (N,)), b=(b, (N,)))
    return {"y": x, "mean": Float32Output((B, C)), "rstd": Float32Output((B, C))}


token_layernorm = Op(
    "token_layernorm",
    shapes={"x": "B N C", "w": "N", "b": "N"},
    constants={"eps": 1e-6},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    saves=("x", "w", "mean", "rstd"),
    parameters=("w", "b"),
    accumulates=("x",),
    cases=[dict(B=2, N=5, C=8), dict(B=3, N=17, C=131), dict(B=64, N=65, C=192)],
    cost=lambda x, w, b, eps: Cost(forward=8 * prod(x), backward=14 * prod(x), macs=5 * prod(x)),
)
