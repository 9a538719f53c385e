"""Batch normalisation over all rows, per channel, with the activation that follows it (Ioffe and Szegedy, 1502.03167); running statistics.

    m = mean(x),  v = mean((x - m)²),  r = 1 / sqrt(v + eps),  h = (x - m)·r,  z = h·w + b,  y = f(z)        means over the rows

or, for evaluation, the same with a given mean and variance. f is the identity, relu, relu6 = min(max(z, 0), 6) or hardswish =
z·relu6(z + 3)/6. With dz = dy·f'(z), since h depends on x directly, through m and through r:

    dx = r·w·(dz - mean(dz) - h·mean(dz·h)),     dw = Σ dz·h,     db = Σ dz        (a given mean and variance: dx = r·w·dz)

Nothing but x and the statistics is kept: backward computes z again. The statistics are as accurate as two passes, and read x once from
memory: each block of rows gets its own mean and sum of squares while it is in a cache, and two sets of na and nb rows are joined by (Chan,
Golub and LeVeque, 1983), with d = mb - ma:

    m = ma + d·nb/(na + nb),     S = Sa + Sb + d²·na·nb/(na + nb),     v = S/n

`running_statistics` follows the statistics of the batches, as PyTorch does, with the unbiased variance of `count` values:

    running_mean += momentum·(mean - running_mean),     running_var += momentum·(variance·count/(count - 1) - running_var)

For inference, `fold_batchnorm` makes the weights and the bias of a product whose result a given mean and variance would normalise:

    weight'[o, k] = weight[o, k]·w[o]/sqrt(v[o] + eps),     bias'[o] = (bias[o] - m[o])·w[o]/sqrt(v[o] + eps) + b[o]

Letters: R rows, C channels, P parts of the rows, K inputs of a channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from .core.arrays import empty, empty_like
from .core.devices import runtime
from .core.op import Cost, Float32Output, Implementation, Op, Shape, require
from .core.recording import launch
from .cpu.activations import LIMITS, activate, activated, activation_arguments, slope, slope_of
from .cpu.kernel import kernel, preparation
from .cpu.strided import bands_for
from .cuda.kernel import Grid, Source
from .cuda.strided import grid_for, vector_width

BLOCK = 32  # rows whose statistics are computed while they are in a cache
PARTS = 64  # parts of the rows: a constant, so that no result depends on the number of threads


# ----------------------------------------------------------------------------------------------------------------- reference
def forward_reference(y, mean, variance, x, w, b, running_mean, running_var, eps, activation):
    rows = tuple(range(x.ndim - 1))
    m, v = running_mean, running_var
    if m is None:
        mean[...], variance[...] = m, v = x.mean(rows), x.var(rows)
    y[...] = activate((x - m) / np.sqrt(v + eps) * w + b, activation)


def backward_reference(dx, dw, db, dy, x, w, b, mean, variance, running_mean, running_var, eps, activation):
    rows = tuple(range(x.ndim - 1))
    m, v = (mean, variance) if running_mean is None else (running_mean, running_var)
    r = 1 / np.sqrt(v + eps)
    h = (x - m) * r  # (..., C)
    dz = dy * slope(h * w + b, activation)
    if dx is not None:
        dx[...] = r * w * (dz - dz.mean(rows) - h * (dz * h).mean(rows) if running_mean is None else dz)
    if dw is not None:
        dw[...] = (dz * h).sum(rows)
    if db is not None:
        db[...] = dz.sum(rows)


# ----------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _statistics(band, bands, partial, block, x):
    (R, C), P, number = x.shape, len(partial), block.dtype.type
    for part in range(band * P // bands, (band + 1) * P // bands):
        mean, squares = partial[part, 0], partial[part, 1]
        own_mean, own_squares = block[part, 0], block[part, 1]
        first, last = part * R // P, (part + 1) * R // P
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            for j in range(C):
                own_mean[j] = 0
                own_squares[j] = 0
            for i in range(start, stop):
                for j in range(C):
                    own_mean[j] += x[i, j]
            share = number(1) / number(stop - start)
            for j in range(C):
                own_mean[j] *= share
            for i in range(start, stop):
                for j in range(C):
                    own_squares[j] += (x[i, j] - own_mean[j]) * (x[i, j] - own_mean[j])
            if start == first:
                for j in range(C):
                    mean[j] = own_mean[j]
                    squares[j] = own_squares[j]
            else:
                part_of_mean = number(stop - start) / number(stop - first)
                part_of_squares = part_of_mean * number(start - first)
                for j in range(C):
                    d = own_mean[j] - mean[j]
                    mean[j] += d * part_of_mean
                    squares[j] += own_squares[j] + d * d * part_of_squares


@kernel
def _join(band, bands, mean, variance, partial, R):
    P, number = len(partial), mean.dtype.type
    mean[:] = partial[0, 0]
    variance[:] = partial[0, 1]
    for part in range(1, P):
        first, last = part * R // P, (part + 1) * R // P
        part_of_mean = number(last - first) / number(last)
        part_of_squares = part_of_mean * number(first)
        for j in range(len(mean)):
            d = partial[part, 0, j] - mean[j]
            mean[j] += d * part_of_mean
            variance[j] += partial[part, 1, j] + d * d * part_of_squares
    for j in range(len(mean)):
        variance[j] /= number(R)


@kernel
def _normalise(band, bands, y, scales, x, w, b, mean, variance, eps, low, high, curved):
    (R, C), number, scale = x.shape, scales.dtype.type, scales[band]
    lowest, highest = number(low), number(high)
    for j in range(C):
        scale[j] = w[j] / np.sqrt(variance[j] + number(eps))
    for i in range(band * R // bands, (band + 1) * R // bands):
        for j in range(C):
            y[i, j] = activated((x[i, j] - mean[j]) * scale[j] + b[j], lowest, highest, curved)


@kernel
def _sums(band, bands, partial, scales, dy, x, w, b, mean, variance, eps, low, high, curved):
    (R, C), P, number, scale = x.shape, len(partial), scales.dtype.type, scales[band]
    lowest, highest = number(low), number(high)
    for j in range(C):
        scale[j] = w[j] / np.sqrt(variance[j] + number(eps))
    for part in range(band * P // bands, (band + 1) * P // bands):
        products, total = partial[part, 0], partial[part, 1]  # Σ dz·(x - m), Σ dz
        products[:] = 0
        total[:] = 0
        for i in range(part * R // P, (part + 1) * R // P):
            for j in range(C):
                centred = x[i, j] - mean[j]
                dz = dy[i, j] * slope_of(centred * scale[j] + b[j], lowest, highest, curved)
                products[j] += dz * centred
                total[j] += dz


@kernel
def _join_sums(band, bands, dw, db, means, partial, variance, eps, R):
    number = dw.dtype.type
    dw[:] = 0
    db[:] = 0
    for part in range(len(partial)):
        for j in range(len(dw)):
            dw[j] += partial[part, 0, j]
            db[j] += partial[part, 1, j]
    share = number(1) / number(R) if R else number(0)
    for j in range(len(dw)):
        r = number(1) / np.sqrt(variance[j] + number(eps))
        dw[j] *= r
        means[0, j] = dw[j] * r * share
        means[1, j] = db[j] * share


@kernel
def _backward(band, bands, dx, scales, dy, x, w, b, mean, variance, means, eps, low, high, curved):
    (R, C), number, scale = x.shape, scales.dtype.type, scales[band]
    lowest, highest, per_centred, constant = number(low), number(high), means[0], means[1]
    for j in range(C):
        scale[j] = w[j] / np.sqrt(variance[j] + number(eps))
    for i in range(band * R // bands, (band + 1) * R // bands):
        for j in range(C):
            centred = x[i, j] - mean[j]
            dz = dy[i, j] * slope_of(centred * scale[j] + b[j], lowest, highest, curved)
            dx[i, j] = scale[j] * (dz - constant[j] - centred * per_centred[j])


@kernel
def _follow(band, bands, new_mean, new_var, running_mean, running_var, mean, variance, momentum, count):
    number = mean.dtype.type
    share, unbiased = number(momentum), number(count / (count - 1))
    for j in range(len(mean)):
        new_mean[j] = running_mean[j] + share * (mean[j] - running_mean[j])
        new_var[j] = running_var[j] + share * (variance[j] * unbiased - running_var[j])


@preparation
def _fold_weight(band, bands, folded, weight, w, variance, eps):
    (C, K), number = weight.shape, w.dtype.type
    for c in range(band * C // bands, (band + 1) * C // bands):
        scale = w[c] / np.sqrt(variance[c] + number(eps))
        for k in range(K):
            folded[c, k] = weight[c, k] * scale


@preparation
def _fold_bias(band, bands, folded, bias, w, b, mean, variance, eps, has_bias):
    number = w.dtype.type
    for c in range(len(w)):
        scale = w[c] / np.sqrt(variance[c] + number(eps))
        folded[c] = ((bias[c] if has_bias else number(0)) - mean[c]) * scale + b[c]


def _rows(x):
    return x.reshape(-1, x.shape[-1])  # (R, C)


def _partial(rows, dtype):
    """Space for two values of each channel and part."""
    R, C = rows.shape
    return empty((max(1, min(PARTS, R // BLOCK)), 2, C), dtype)


def forward_cpu(y, mean, variance, x, w, b, running_mean, running_var, eps, activation):
    rows, (C,) = _rows(x), w.shape
    if running_mean is None:
        partial, block = _partial(rows, w.dtype), _partial(rows, w.dtype)
        launch(_statistics, len(partial), partial, block, rows)
        launch(_join, 1, mean, variance, partial, len(rows))
    else:
        mean, variance = running_mean, running_var
    bands = bands_for(x.size)
    launch(
        _normalise, bands, _rows(y), empty((bands, C), w.dtype), rows, w, b, mean, variance, float(eps), *activation_arguments(activation)
    )


def backward_cpu(dx, dw, db, dy, x, w, b, mean, variance, running_mean, running_var, eps, activation):
    rows, dy, (C,), last = _rows(x), _rows(dy), w.shape, (float(eps), *activation_arguments(activation))
    if running_mean is not None:
        mean, variance = running_mean, running_var
    means, bands = empty((2, C), w.dtype), bands_for(x.size)
    partial = _partial(rows, w.dtype)
    dw, db = (empty_like(w) if d is None else d for d in (dw, db))
    launch(_sums, len(partial), partial, empty((len(partial), C), w.dtype), dy, rows, w, b, mean, variance, *last)
    launch(_join_sums, 1, dw, db, means, partial, variance, float(eps), len(rows) if running_mean is None else 0)
    if dx is not None:
        launch(_backward, bands, _rows(dx), empty((bands, C), w.dtype), dy, rows, w, b, mean, variance, means, *last)


def follow_cpu(new_mean, new_var, running_mean, running_var, mean, variance, momentum, count):
    launch(_follow, 1, new_mean, new_var, running_mean, running_var, mean, variance, float(momentum), count)


def fold_cpu(new_weight, new_bias, weight, bias, w, b, mean, variance, eps):
    matrices = (a.reshape(len(w), -1) for a in (new_weight, weight))
    launch(_fold_weight, bands_for(weight.size), *matrices, w, variance, float(eps))
    launch(_fold_bias, 1, new_bias, b if bias is None else bias, w, b, mean, variance, float(eps), bias is not None)


# ---------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("batchnorm")
WARPS = 8  # of a block; each takes every so many-th row of 32 vectors of columns


def _tiling(x, *others):
    """(template arguments, grid, number of warps per column, R, C) for kernels in which a thread owns some columns of rows."""
    C = x.shape[-1]
    R = x.size // C
    width = vector_width(C, x, *(a for a in others if a is not None))
    across = -(-C // (32 * width))
    parts = max(1, min(8 * runtime().multiprocessors // across, -(-R // (4 * WARPS))))
    return (x.dtype, width), Grid(across * parts, 32 * WARPS), parts * WARPS, R, C


def forward_cuda(y, mean, variance, x, w, b, running_mean, running_var, eps, activation):
    types, grid, lanes, R, C = _tiling(x, y)
    if running_mean is None:
        partial = empty((lanes, 2, C), w.dtype, "cuda")
        launch(_source("statistics", *types), grid, partial, x, R, C)
        launch(_source("join", w.dtype), grid_for(C), mean, variance, partial, lanes, R, C)
    else:
        mean, variance = running_mean, running_var
    launch(_source("normalise", *types), grid, y, x, w, b, mean, variance, R, C, float(eps), *activation_arguments(activation))


def backward_cuda(dx, dw, db, dy, x, w, b, mean, variance, running_mean, running_var, eps, activation):
    types, grid, lanes, R, C = _tiling(x, dx, dy)
    last = (R, C, float(eps), *activation_arguments(activation))
    if running_mean is not None:
        mean, variance = running_mean, running_var
    partial, means = empty((lanes, 2, C), w.dtype, "cuda"), empty((2, C), w.dtype, "cuda")
    launch(_source("sums", *types), grid, partial, dy, x, w, b, mean, variance, *last)
    batch = R if running_mean is None else 0
    launch(_source("join_sums", w.dtype), grid_for(C), dw, db, means, partial, variance, lanes, batch, C, float(eps))
    if dx is not None:
        launch(_source("batchnorm_backward", *types), grid, dx, dy, x, w, b, mean, variance, means, *last)


def follow_cuda(new_mean, new_var, running_mean, running_var, mean, variance, momentum, count):
    C = mean.size
    arrays = new_mean, new_var, running_mean, running_var, mean, variance
    launch(_source("follow", mean.dtype), grid_for(C), *arrays, C, float(momentum), count / (count - 1))


def fold_cuda(new_weight, new_bias, weight, bias, w, b, mean, variance, eps):
    K = weight.size // len(w)
    kernel = _source("fold_weight", w.dtype, prepares=True)
    launch(kernel, grid_for(weight.size), new_weight, weight, w, variance, len(w), K, float(eps))
    launch(_source("fold_bias", w.dtype, prepares=True), grid_for(len(w)), new_bias, bias, w, b, mean, variance, len(w), float(eps))


# ---------------------------------------------------------------------------------------------------------------------- spec
def _outputs(x, w, b, running_mean, running_var, eps, activation):
    if (running_mean is None) is not (running_var is None):
        raise ValueError("batchnorm: a running mean and a running variance come together")
    if running_mean is None and prod(x[:-1]) < 2:
        raise ValueError(f"batchnorm: x has shape {x}, and one row has no variance")
    require("batchnorm", w=(w, x[-1:]), b=(b, x[-1:]), running_mean=(running_mean, x[-1:]), running_var=(running_var, x[-1:]))
    statistics = Float32Output(w) if running_mean is None else None
    return {"y": x, "mean": statistics, "variance": statistics}


def _follow_reference(new_mean, new_var, running_mean, running_var, mean, variance, momentum, count):
    new_mean[...] = running_mean + momentum * (mean - running_mean)
    new_var[...] = running_var + momentum * (variance * (count / (count - 1)) - running_var)


def _fold_reference(new_weight, new_bias, weight, bias, w, b, mean, variance, eps):
    scale = w / np.sqrt(variance + eps)
    new_weight[...] = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    new_bias[...] = (0 if bias is None else bias) * scale - mean * scale + b


def _follow_outputs(running_mean, running_var, mean, variance, momentum, count):
    if count < 2:
        raise ValueError(f"running_statistics: the variance of {count} values is unknown")
    require("running_statistics", running_var=(running_var, running_mean), mean=(mean, running_mean), variance=(variance, running_mean))
    return {"new_mean": running_mean, "new_var": running_var}


def _two_clusters(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    """Rows near 1 and near -1 by turns: with the other values below, nothing lies where the activation has two slopes."""
    signs = np.where(np.arange(prod(shape[:-1])) % 2, 1.0, -1.0).reshape(*shape[:-1], 1)
    return signs + rng.uniform(-0.1, 0.1, shape)


def _scales(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    """So that an activation has all its parts: values beyond 6, beyond 3, and between."""
    return rng.choice([-10.0, -4.5, 1.0, 1.3, 4.5, 10.0], shape)


def _small(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    return rng.uniform(-0.1, 0.1, shape)


def _positive(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    return rng.uniform(0.9, 1.1, shape)


GIVEN = {"running_mean": "C", "running_var": "C"}  # a case for evaluation
BATCH = dict.fromkeys(GIVEN)

batchnorm = Op(
    "batchnorm",
    shapes={"x": "B N C", "w": "C", "b": "C", **GIVEN},
    accepts={"x": "... C"},
    constants={"eps": 1e-5, "activation": "none"},
    choices={"activation": LIMITS},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    gradients=("x", "w", "b"),
    detached=("mean", "variance"),
    saves=("x", "w", "b", "mean", "variance", *GIVEN),
    parameters=("w", "b", *GIVEN),
    cases=[
        dict(B=2, N=5, C=8, activation="hardswish", **BATCH),
        dict(B=3, N=4, C=5, activation="relu6"),
        dict(B=3, N=67, C=7, activation="relu", **BATCH),
        dict(B=2, N=8, C=3, eps=0.1, **BATCH),
        dict(B=4, N=3, C=17, activation="hardswish"),
        dict(B=64, N=64, C=768, activation="hardswish", **BATCH),
    ],
    cost=lambda x, *_: Cost(forward=12 * prod(x), backward=20 * prod(x)),
    values={"x": _two_clusters, "w": _scales, "b": _small, "running_mean": _small, "running_var": _positive},
)

running_statistics = Op(
    "running_statistics",
    shapes={"running_mean": "C", "running_var": "C", "mean": "C", "variance": "C"},
    constants={"momentum": 0.1, "count": 2},
    outputs=_follow_outputs,
    results=("new_mean", "new_var"),
    parameters=("running_mean", "running_var", "mean", "variance"),
    forward=Implementation(_follow_reference, follow_cpu, follow_cuda),
    cases=[dict(C=5, count=7), dict(C=1, momentum=1.0), dict(C=768, count=4096, momentum=0.01)],
    cost=lambda running_mean, *_: Cost(forward=6 * prod(running_mean)),
    values={"running_var": _positive, "variance": _positive},
)

fold_batchnorm = Op(
    "fold_batchnorm",
    shapes={"weight": "C K", "bias": "C", "w": "C", "b": "C", "mean": "C", "variance": "C"},
    accepts={"weight": "C ..."},
    constants={"eps": 1e-5},
    outputs=lambda weight, bias, w, *_: {"new_weight": weight, "new_bias": w},
    results=("new_weight", "new_bias"),
    parameters=("weight", "bias", "w", "b", "mean", "variance"),
    forward=Implementation(_fold_reference, fold_cpu, fold_cuda),
    cases=[dict(C=5, K=7), dict(C=3, K=4, weight="C 2 2 K", bias=None), dict(C=768, K=192, eps=1e-3, bias=None)],
    cost=lambda weight, *_: Cost(forward=prod(weight)),
    values={"variance": _positive},
)
