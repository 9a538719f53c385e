"""Attention probabilities that are mixed among the heads, as in Re-attention (Zhou et al., 2103.11886, section 4.2).

`head_mixing` weights the values by mixed probabilities, with a matrix A and a constant c for each head:

    m_h = c_h + Σ_g A_hg·p_g,      y_h = m_h·v_h

    dm_h = dy_h·v_hᵀ,   dv_h = m_hᵀ·dy_h,   dp_g = Σ_h A_hg·dm_h,   dA_hg = Σ dm_h·p_g,   dc_h = Σ dm_h

In a Re-attention module A and c contain the batch normalisation that follows the mixing matrix W. Since the mixed probabilities are
linear in p, their mean and variance over the batch are those of W·p: with μ and C the mean and the covariance of p among the heads, W·μ and
the diagonal of W·C·Wᵀ. `head_moments` computes these two over all n samples, queries and keys, so that no mixed probability is ever stored:

    μ_h = mean(p_h),   C_hg = mean((p_h - μ_h)·(p_g - μ_g)),   dp_h += (dμ_h + Σ_g (dC_hg + dC_gh)·(p_g - μ_g)) / n

A row of N probabilities sums to 1, so sums are taken of p - 1/N, which cancels next to nothing.
On a CPU, the probabilities of all heads of one sample stay in L2.

Letters: B batch, N tokens, H heads, D head size, S = N² probabilities of a head.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .core.arrays import empty, empty_like
from .core.op import Cost, Float32Output, Implementation, Op, Shape, require
from .core.recording import launch
from .core.strides import ADD
from .cpu.compile import routine
from .cpu.gemm import tile_of
from .cpu.kernel import kernel
from .cpu.operands import Matrix, Method, Size
from .cpu.product import plain_product, product_entry, scratch_bytes
from .cpu.run import threads
from .cpu.strided import copy, fill, in_float32
from .cpu.views import item_bytes, zero_of
from .cuda import primitives as cuda

CHUNK = 512  # probabilities of each head that are combined while they are in L1


# -------------------------------------------------------------------------------------------------------------- reference
def moments_reference(mean, covariance, p):
    rows = np.moveaxis(p, 1, 0).reshape(p.shape[1], -1)  # (H, n)
    mean[...] = rows.mean(1)
    centred = rows - rows.mean(1, keepdims=True)
    covariance[...] = centred @ centred.T / rows.shape[1]


def moments_backward_reference(dp, dmean, dcovariance, dp_sum, p, mean):
    count = p.size // p.shape[1]
    gradient = np.zeros_like(p)
    if dmean is not None:
        gradient += dmean[:, None, None] / count
    if dcovariance is not None:
        gradient += np.einsum("hg,bgij->bhij", dcovariance + dcovariance.T, p - mean[:, None, None]) / count
    dp[...] = gradient if dp_sum is None else dp_sum + gradient


def _mixed(p, a, c):
    return np.einsum("hg,bgij->bhij", a, p) + c[:, None, None]


def mixing_reference(y, p, v, a, c):
    y[...] = np.einsum("bhij,bjhd->bihd", _mixed(p, a, c), v)


def mixing_backward_reference(dp, dv, da, dc, dy, p, v, a, c):
    dm = np.einsum("bihd,bjhd->bhij", dy, v)
    if dp is not None:
        dp[...] = np.einsum("hg,bhij->bgij", a, dm)
    if dv is not None:
        dv[...] = np.einsum("bhij,bihd->bjhd", _mixed(p, a, c), dy)
    if da is not None:
        da[...] = np.einsum("bhij,bgij->hg", dm, p)
    if dc is not None:
        dc[...] = dm.sum((0, 2, 3))


# -------------------------------------------------------------------------------------------------------------------- CPU
@routine
def _combine(out, at, start, factors, rows, shift, first, size):
    """out[at : at + size] = start + Σ factors[g]·(rows[g, first : first + size] - shift), four rows at a time."""
    for j in range(size):
        out[np.uint64(at + j)] = start
    whole = len(factors) // 4 * 4
    for g in range(0, whole, 4):
        f0, f1, f2, f3 = factors[g], factors[g + 1], factors[g + 2], factors[g + 3]
        r0, r1, r2, r3 = rows[g], rows[g + 1], rows[g + 2], rows[g + 3]
        for j in range(size):
            k = np.uint64(first + j)
            out[np.uint64(at + j)] += (f0 * (r0[k] - shift) + f1 * (r1[k] - shift)) + (f2 * (r2[k] - shift) + f3 * (r3[k] - shift))
    for g in range(whole, len(factors)):
        factor, row = factors[g], rows[g]
        for j in range(size):
            out[np.uint64(at + j)] += factor * (row[np.uint64(first + j)] - shift)


@routine
def _dot(zero, x, y, size):
    total = zero
    for j in range(size):
        total += x[np.uint64(j)] * y[np.uint64(j)]
    return total


@kernel
def _moments(band, bands, partial, chunks, p, shift):
    B, H, S = p.shape
    zero, rows = zero_of(partial), chunks[band]
    number = type(zero)(shift)
    for b in range(band * B // bands, (band + 1) * B // bands):
        total = partial[b]  # (H, H + 1): the products, and the sums
        total[:] = 0
        for first in range(0, S, CHUNK):
            size = min(CHUNK, S - first)
            for h in range(H):
                row, source, own = rows[h], p[b, h], zero
                for j in range(size):
                    row[np.uint64(j)] = source[np.uint64(first + j)] - number
                    own += row[np.uint64(j)]
                total[h, H] += own
                for g in range(h + 1):
                    total[h, g] += _dot(zero, row, rows[g], size)


@kernel
def _join_moments(band, bands, mean, covariance, partial, shift, count):
    B, H, _ = partial.shape
    number = mean.dtype.type
    share = number(1) / number(count)
    for h in range(H):
        mean[h] = 0
        covariance[h] = 0
    for b in range(B):
        for h in range(H):
            mean[h] += partial[b, h, H] * share
            for g in range(h + 1):
                covariance[h, g] += partial[b, h, g] * share
    for h in range(H):
        for g in range(h + 1):
            covariance[h, g] -= mean[h] * mean[g]
            covariance[g, h] = covariance[h, g]
    for h in range(H):
        mean[h] += number(shift)


@kernel
def _moments_backward(band, bands, dp, dmean, dcovariance, dp_sum, p, mean, factors, chunks, shift, count, add):
    B, H, S = p.shape
    number, factor, chunk = mean.dtype.type, factors[band], chunks[band]
    share, middle = number(1) / number(count), number(shift)
    for h in range(H):
        for g in range(H):
            factor[h, g] = (dcovariance[h, g] + dcovariance[g, h]) * share
    for b in range(band * B // bands, (band + 1) * B // bands):
        for first in range(0, S, CHUNK):
            size = min(CHUNK, S - first)
            for h in range(H):
                start = dmean[h] * share
                for g in range(H):
                    start -= factor[h, g] * (mean[g] - middle)
                _combine(chunk, 0, start, factor[h], p[b], middle, first, size)
                out = dp[b, h]
                if add:
                    running = dp_sum[b, h]
                    for j in range(size):
                        out[np.uint64(first + j)] = chunk[np.uint64(j)] + running[np.uint64(first + j)]
                else:
                    for j in range(size):
                        out[np.uint64(first + j)] = chunk[np.uint64(j)]


@kernel
def _mixing(band, bands, method, y, p, v, a, c, squares, scratch):
    (B, H, S), N, D = p.shape, v.shape[1], v.shape[3]
    zero, square = zero_of(p), squares[band]
    item, row = item_bytes(zero), H * D
    for head in range(band * B * H // bands, (band + 1) * B * H // bands):
        b, h = head // H, head % H
        for first in range(0, S, CHUNK):
            _combine(square, first, c[h], a[h], p[b], zero, first, min(CHUNK, S - first))
        shift = (b * N * row + h * D) * item
        values, out = Matrix(v.ctypes.data + shift, row, 1), Matrix(y.ctypes.data + shift, row, 1)
        mixed = Matrix(squares.ctypes.data + band * S * item, N, 1)
        plain_product(method, scratch.ctypes.data + band * scratch.shape[1], Size(N, D, N), mixed, values, out, 0)


@kernel
def _mixing_backward(band, bands, method, dp, dv, partial, dy, p, v, a, columns, c, squares, scratch):
    (B, H, S), N, D = p.shape, v.shape[1], v.shape[3]
    zero, dm, square = zero_of(p), squares[band], squares[band, H]  # (H, S) and, after it, (S,)
    item, row = item_bytes(zero), H * D
    address, own = scratch.ctypes.data + band * scratch.shape[1], squares.ctypes.data + band * (H + 1) * S * item
    for b in range(band * B // bands, (band + 1) * B // bands):
        for h in range(H):
            shift, gradient = (b * N * row + h * D) * item, dm[h]
            arrived, target = Matrix(dy.ctypes.data + shift, row, 1), Matrix(own + h * S * item, N, 1)
            plain_product(method, address, Size(N, N, D), arrived, Matrix(v.ctypes.data + shift, 1, row), target, 0)
            for first in range(0, S, CHUNK):
                _combine(square, first, c[h], a[h], p[b], zero, first, min(CHUNK, S - first))
            mixed = Matrix(own + H * S * item, 1, N)
            plain_product(method, address, Size(N, D, N), mixed, arrived, Matrix(dv.ctypes.data + shift, row, 1), 0)
            for g in range(H):
                partial[b, h, g] = _dot(zero, gradient, p[b, g], S)
            total = zero
            for j in range(S):
                total += gradient[np.uint64(j)]
            partial[b, h, H] = total
        for first in range(0, S, CHUNK):
            for g in range(H):
                _combine(dp[b, g], first, zero, columns[g], dm[:H], zero, first, min(CHUNK, S - first))


@kernel
def _join_mixing(band, bands, da, dc, partial):
    B, H, _ = partial.shape
    da[:] = 0
    dc[:] = 0
    for b in range(B):
        for h in range(H):
            dc[h] += partial[b, h, H]
            for g in range(H):
                da[h, g] += partial[b, h, g]


def _flat(p: np.ndarray) -> np.ndarray:
    return p.reshape(*p.shape[:2], -1)  # (B, H, S)


@in_float32(outputs=0)
def moments_cpu(mean, covariance, p):
    B, H, N, _ = p.shape
    bands, partial = min(threads(), B), empty((B, H, H + 1), mean.dtype)
    launch(_moments, bands, partial, empty((bands, H, CHUNK), mean.dtype), _flat(p), 1 / N)
    launch(_join_moments, 1, mean, covariance, partial, 1 / N, B * N * N)


@in_float32(outputs=1)
def moments_backward_cpu(dp, dmean, dcovariance, dp_sum, p, mean):
    B, H, N, _ = p.shape
    zeros = [empty(shape, mean.dtype) for shape in ((H,), (H, H))]
    for array in zeros:
        fill(array, 0.0)
    dmean, dcovariance = (zero if d is None else d for d, zero in zip((dmean, dcovariance), zeros))
    bands = min(threads(), B)
    scratch = empty((bands, H, H), mean.dtype), empty((bands, CHUNK), mean.dtype)
    running = p if dp_sum is None else dp_sum
    last = 1 / N, B * N * N, dp_sum is not None
    launch(_moments_backward, bands, _flat(dp), dmean, dcovariance, _flat(running), _flat(p), mean, *scratch, *last)


def _product(p: np.ndarray, v: np.ndarray, bands: int) -> tuple[Method, np.ndarray]:
    """The method of the products, and scratch memory for each band."""
    tile, N, D = tile_of(p.dtype), v.shape[1], v.shape[3]
    size = scratch_bytes(tile, N, max(N, D), max(N, D))
    return Method(product_entry(tile), 0), empty((bands, -(-size // 64) * 64), np.uint8)


@in_float32(outputs=1)
def mixing_cpu(y, p, v, a, c):
    B, H, N, _ = p.shape
    bands = min(threads(), B * H)
    method, scratch = _product(p, v, bands)
    launch(_mixing, bands, method, y, _flat(p), v, a, c, empty((bands, N * N), p.dtype), scratch)


@in_float32(outputs=4)
def mixing_backward_cpu(dp, dv, da, dc, dy, p, v, a, c):
    B, H, N, _ = p.shape
    dp, dv, da, dc = (empty_like(x) if d is None else d for d, x in ((dp, p), (dv, v), (da, a), (dc, c)))
    bands, columns, partial = min(threads(), B), empty((H, H), a.dtype), empty((B, H, H + 1), a.dtype)
    copy(columns, a, (H, H), (H, 1), (1, H))
    method, scratch = _product(p, v, bands)
    squares = empty((bands, H + 1, N * N), p.dtype)
    launch(_mixing_backward, bands, method, _flat(dp), dv, partial, dy, _flat(p), v, a, columns, c, squares, scratch)
    launch(_join_mixing, 1, da, dc, partial)


# ------------------------------------------------------------------------------------------------------------------- CUDA
def _centred_cuda(p: Any, mean: Any) -> Any:
    centred = empty(_flat(p).shape, mean.dtype, "cuda")
    cuda.combine(ADD, centred, _flat(p), mean.reshape(1, -1, 1), sign=-1.0)
    return centred


def moments_cuda(mean, covariance, p):
    H = p.shape[1]
    share = H / p.size
    cuda.sum_into(mean.reshape(1, H, 1), _flat(p), scale=share)
    centred, sums = _centred_cuda(p, mean), empty((H, H), mean.dtype, "cuda")
    cuda.gemm(sums, centred, centred, transpose_b=True, sum_batch=True)
    cuda.copy(covariance, sums, (H * H,), (1,), (1,), scale=share)


def moments_backward_cuda(dp, dmean, dcovariance, dp_sum, p, mean):
    H = p.shape[1]
    share, gradient = H / p.size, empty(_flat(p).shape, mean.dtype, "cuda")
    if dcovariance is None:
        cuda.fill(gradient, 0.0)
    else:
        factors, swapped = (empty((H, H), mean.dtype, "cuda") for _ in range(2))
        cuda.copy(factors, dcovariance, (H, H), (H, 1), (H, 1), scale=share)
        cuda.copy(swapped, dcovariance, (H, H), (H, 1), (1, H), scale=share)
        cuda.combine(ADD, factors, factors, swapped)
        cuda.gemm(gradient, factors, _centred_cuda(p, mean))
    if dmean is not None:
        constant = empty((H,), mean.dtype, "cuda")
        cuda.copy(constant, dmean, (H,), (1,), (1,), scale=share)
        cuda.combine(ADD, gradient, gradient, constant.reshape(1, H, 1))
    if dp_sum is None:
        cuda.convert(_flat(dp), gradient)
    else:
        cuda.combine(ADD, _flat(dp), _flat(dp_sum), gradient)


def _by_head(x: Any) -> Any:
    """x (B, N, H, D) as (B·H, N, D)."""
    B, N, H, D = x.shape
    y = empty((B * H, N, D), x.dtype, "cuda")
    cuda.copy(y, x, (B, H, N, D), (H * N * D, N * D, D, 1), (N * H * D, D, H * D, 1))
    return y


def _by_token(y: Any, x: Any) -> None:
    """The inverse of `_by_head`: y (B, N, H, D) from x (B·H, N, D)."""
    B, N, H, D = y.shape
    cuda.copy(y, x, (B, N, H, D), (N * H * D, H * D, D, 1), (H * N * D, D, N * D, 1))


def _mixed_cuda(p: Any, a: Any, c: Any) -> Any:
    B, H, N, _ = p.shape
    mixed = empty((B, H, N * N), p.dtype, "cuda")
    cuda.gemm(mixed, a, _flat(p))
    cuda.combine(ADD, mixed, mixed, c.reshape(1, H, 1))
    return mixed.reshape(B * H, N, N)


def mixing_cuda(y, p, v, a, c):
    values = _by_head(v)
    out = empty(values.shape, y.dtype, "cuda")
    cuda.gemm(out, _mixed_cuda(p, a, c), values)
    _by_token(y, out)


def mixing_backward_cuda(dp, dv, da, dc, dy, p, v, a, c):
    B, H, N, _ = p.shape
    arrived, dm = _by_head(dy), empty((B * H, N, N), a.dtype, "cuda")
    cuda.gemm(dm, arrived, _by_head(v), transpose_b=True)
    by_sample = dm.reshape(B, H, N * N)
    if dv is not None:
        out = empty(arrived.shape, dv.dtype, "cuda")
        cuda.gemm(out, _mixed_cuda(p, a, c), arrived, transpose_a=True)
        _by_token(dv, out)
    if da is not None:
        cuda.gemm(da, by_sample, _flat(p), transpose_b=True, sum_batch=True)
    if dc is not None:
        cuda.sum_into(dc.reshape(1, H, 1), by_sample)
    if dp is not None:
        cuda.gemm(_flat(dp), a, by_sample, transpose_a=True)


# ------------------------------------------------------------------------------------------------------------------- spec
def _probabilities(rng: np.random.Generator, shape: Shape, sizes: Any) -> np.ndarray:
    powers = np.exp(rng.standard_normal(shape))
    return powers / powers.sum(-1, keepdims=True)


def _mixing_outputs(p: Shape, v: Shape, a: Shape, c: Shape) -> dict[str, Shape]:
    B, H, N, _ = p
    require("head_mixing", p=(p, (B, H, N, N)), v=(v, (B, N, H, v[3])), a=(a, (H, H)), c=(c, (H,)))
    return {"y": v}


head_moments = Op(
    "head_moments",
    shapes={"p": "B H N N"},
    outputs=lambda p: {"mean": Float32Output(p[1:2]), "covariance": Float32Output((p[1], p[1]))},
    results=("mean", "covariance"),
    forward=Implementation(moments_reference, moments_cpu, moments_cuda),
    backward=Implementation(moments_backward_reference, moments_backward_cpu, moments_backward_cuda),
    saves=("p", "mean"),
    accumulates=("p",),
    cases=[dict(B=2, H=3, N=5), dict(B=1, H=1, N=2), dict(B=3, H=6, N=27), dict(B=64, H=12, N=65)],
    cost=lambda p: Cost(forward=2 * prod(p) * p[1], backward=2 * prod(p) * p[1]),
    values={"p": _probabilities},
)

head_mixing = Op(
    "head_mixing",
    shapes={"p": "B H N N", "v": "B N H D", "a": "H H", "c": "H"},
    outputs=_mixing_outputs,
    forward=Implementation(mixing_reference, mixing_cpu, mixing_cuda),
    backward=Implementation(mixing_backward_reference, mixing_backward_cpu, mixing_backward_cuda),
    saves=("p", "v", "a", "c"),
    parameters=("a", "c"),
    cases=[dict(B=2, H=3, N=5, D=4), dict(B=1, H=1, N=1, D=1), dict(B=3, H=6, N=27, D=9), dict(B=64, H=12, N=65, D=32)],
    cost=lambda p, v, a, c: Cost.of_products(prod(p) * (p[1] + v[3])),
    values={"p": _probabilities},
)
