"""Depthwise convolution of channels-last maps: every channel has a kernel of its own (1704.04861, section 3.1); with bias and activation.

    z[b, u, v, c] = bias[c] + Σ_ij x[b, u·s + i - ph, v·s + j - pw, c]·w[c, i, j],     y = f(z)          x is 0 outside the map

    dx[b, h, w, c] = Σ dz[b, u, v, c]·w[c, i, j]  over u·s + i = h + ph,  v·s + j = w + pw
    dw[c, i, j] = Σ_buv dz[b, u, v, c]·x[b, u·s + i - ph, v·s + j - pw, c],     dbias = Σ dz,     dz = dy·f'(z)

f is the identity or an activation. Forward and dx are one kernel, which gathers y[p] = Σ_k x[(p·up + k - start) / down]·taps[k] over
the k for which the division has no rest: up = s and down = 1, or with reversed taps up = 1 and down = s. A band computes whole maps, for a
few registers of channels at a time: sums stay in registers, and the rows of x that a row of y reads stay in a cache.

Letters: B batch, (H, W) map, (U, V) result, C channels, (kh, kw) kernel, s stride, (ph, pw) padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .core.arrays import empty
from .core.op import Cost, Implementation, Op, Shape, require
from .core.recording import launch
from .cpu.activations import LIMITS, activate, activation_arguments, slope, slope_of
from .cpu.compile import routine
from .cpu.gemm import column_sums
from .cpu.kernel import kernel, preparation
from .cpu.run import threads
from .cpu.strided import bands_for
from .cpu.vectors import REGISTER, functions
from .cpu.views import item_bytes, zero_of
from .cuda.gemm import column_sums as column_sums_cuda
from .cuda.kernel import Grid, Source
from .cuda.strided import grid_for, vector_width

WIDE, NARROW = REGISTER, 8  # channels that are computed together: four registers of float32, and where there are not as many
LINE = 64  # bytes in a line of memory
PARTS = 64  # partial sums of dw: a constant, so that no result depends on the number of threads
Pair = tuple[int, int]


class Sizes(NamedTuple):
    """Of the map that is read, of the result, and of the kernel."""

    B: int
    H: int
    W: int
    U: int
    V: int
    kh: int
    kw: int
    C: int


def _result_shape(x: Shape, w: Shape, stride: int, padding: Pair) -> Shape:
    if stride < 1 or min(padding) < 0:
        raise ValueError(f"depthwise: stride {stride} must be at least 1, padding {padding} at least 0")
    grid = [(n + 2 * p - k) // stride + 1 for n, k, p in zip(x[1:3], w[1:], padding)]
    if min(grid) < 1:
        raise ValueError(f"depthwise: kernels of {w[1:]} do not fit into maps of {x[1:3]} with padding {padding}")
    return x[0], *grid, x[3]


# ----------------------------------------------------------------------------------------------------------------- reference
def _windows(padded: np.ndarray, kernel: Shape, stride: int) -> np.ndarray:
    """A view (B, U, V, C, kh, kw) of padded maps (B, ..., C)."""
    return np.lib.stride_tricks.sliding_window_view(padded, kernel, (1, 2), writeable=True)[:, ::stride, ::stride]


def _padded(x: np.ndarray, padding: Pair) -> np.ndarray:
    return np.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])


def forward_reference(y, pre, x, w, bias, stride, padding, activation):
    z = (_windows(_padded(x, padding), w.shape[1:], stride) * w).sum((-2, -1))
    if bias is not None:
        z = z + bias
    if pre is not None:
        pre[...] = z
    y[...] = activate(z, activation)


def backward_reference(dx, dw, dbias, dy, x, w, pre, stride, padding, activation):
    dz = dy if activation == "none" else dy * slope(pre, activation)  # (B, U, V, C)
    if dx is not None:
        (_, H, W, _), (ph, pw) = dx.shape, padding
        padded = _padded(np.zeros(dx.shape, dy.dtype), padding)
        windows = _windows(padded, w.shape[1:], stride)
        for i, j in np.ndindex(w.shape[1:]):
            windows[..., i, j] += dz * w[:, i, j]
        dx[...] = padded[:, ph : ph + H, pw : pw + W]
    if dw is not None:
        dw[...] = (_windows(_padded(x, padding), w.shape[1:], stride) * dz[..., None, None]).sum((0, 1, 2))
    if dbias is not None:
        dbias[...] = dz.sum((0, 1, 2))


# ----------------------------------------------------------------------------------------------------------------------- CPU
@preparation
def _by_tap(band, bands, taps, w):
    C, K = w.shape
    for k in range(K):
        for c in range(C):
            taps[k, c] = w[c, k]


@routine
def _quotient(a, b):
    return a if b == 1 else a // b


@routine
def _run(start, down, taps, size):
    """(first, stop): the taps first, first + down, ... < stop for which (start + tap) / down is whole and in 0 ... size - 1."""
    first = -start if start < 0 else 0 if down == 1 else -start % down
    return first, min(taps, (size - 1) * down - start + 1)


def _block(lanes: int) -> tuple[Callable, Callable]:
    """The inner parts of the kernels below, for so many adjacent channels."""
    load, store, multiply_add, zeros, prefetch, activate = functions(lanes)

    @routine
    def gather(y, pre, x, taps, bias, b, c, sizes, up, down, top, left, flip, keep, low, high, curved):
        """One map of the result, and of `pre` if `keep`, from channel c on."""
        x_zero, tap_zero = zero_of(x), zero_of(taps)
        item, step = item_bytes(x_zero), sizes.C * item_bytes(tap_zero) * (-1 if flip else 1)
        column = sizes.C * item
        out, kept = y.ctypes.data + (b * sizes.U * sizes.V * sizes.C + c) * item, pre.ctypes.data - y.ctypes.data
        first_tap = taps.ctypes.data + ((sizes.kh * sizes.kw - 1 if flip else 0) * sizes.C + c) * item_bytes(tap_zero)
        for u in range(sizes.U):
            h = u * up - top
            i0, i1 = _run(h, down, sizes.kh, sizes.H)
            line = x.ctypes.data + ((b * sizes.H + _quotient(h + i0, down)) * sizes.W * sizes.C + c) * item
            for v in range(sizes.V):
                w = v * up - left
                j0, j1 = _run(w, down, sizes.kw, sizes.W)
                row, z = line + _quotient(w + j0, down) * column, zeros(tap_zero)
                if len(bias):
                    z = load(tap_zero, bias.ctypes.data + c * item_bytes(tap_zero))
                for i in range(i0, i1, down):
                    at, tap = row, first_tap + (i * sizes.kw + j0) * step
                    for _ in range(j0, j1, down):
                        z = multiply_add(load(x_zero, at), load(tap_zero, tap), z)
                        at += column
                        tap += down * step
                    row += sizes.W * column
                ahead = row  # the next row, or the first one of the next channels
                if h + i1 >= sizes.H:
                    ahead += lanes * item - sizes.H * sizes.W * column
                for distance in range(0, lanes * item, LINE):  # the CPU does not foresee reads so far apart
                    prefetch(ahead + distance)
                if keep:
                    store(x_zero, out + kept, z)
                store(x_zero, out, activate(z, low, high, curved))
                out += column

    @routine
    def correlate(sums, dy, x, b, c, sizes, stride, top, left):
        """sums[k, c] += the sums of dy·x over one map, for each tap k, from channel c on."""
        x_zero, sum_zero = zero_of(x), zero_of(sums)
        column, tap_step = sizes.C * item_bytes(x_zero), sizes.C * item_bytes(sum_zero)
        map_of_x = x.ctypes.data + (b * sizes.H * sizes.W * sizes.C + c) * item_bytes(x_zero)
        row_of_dy = dy.ctypes.data + (b * sizes.U * sizes.V * sizes.C + c) * item_bytes(x_zero)
        for u in range(sizes.U):
            h = u * stride - top
            for i in range(max(0, -h), min(sizes.kh, sizes.H - h)):
                for j in range(sizes.kw):
                    v0 = max(0, (left - j + stride - 1) // stride)  # the results whose tap lies inside the map
                    v1 = min(sizes.V, (sizes.W - 1 + left - j) // stride + 1)
                    at = sums.ctypes.data + c * item_bytes(sum_zero) + (i * sizes.kw + j) * tap_step
                    p, total = row_of_dy + v0 * column, load(sum_zero, at)
                    q = map_of_x + ((h + i) * sizes.W + v0 * stride + j - left) * column
                    for _ in range(v0, v1):
                        total = multiply_add(load(x_zero, p), load(x_zero, q), total)
                        p += column
                        q += stride * column
                    store(sum_zero, at, total)
            row_of_dy += sizes.V * column

    return gather, correlate


_gather_wide, _correlate_wide = _block(WIDE)
_gather_narrow, _correlate_narrow = _block(NARROW)
_gather_one, _correlate_one = _block(1)


@kernel
def _gather(band, bands, y, pre, x, taps, bias, sizes, up, down, top, left, flip, keep, low, high, curved):
    number, C = taps.dtype.type, sizes.C
    lowest, highest = number(low), number(high)
    blocks = (C + WIDE - 1) // WIDE
    for item in range(band * sizes.B * blocks // bands, (band + 1) * sizes.B * blocks // bands):
        b, c = item // blocks, item % blocks * WIDE
        if c + WIDE <= C:
            _gather_wide(y, pre, x, taps, bias, b, c, sizes, up, down, top, left, flip, keep, lowest, highest, curved)
            continue
        while c + NARROW <= C:
            _gather_narrow(y, pre, x, taps, bias, b, c, sizes, up, down, top, left, flip, keep, lowest, highest, curved)
            c += NARROW
        while c < C:
            _gather_one(y, pre, x, taps, bias, b, c, sizes, up, down, top, left, flip, keep, lowest, highest, curved)
            c += 1


@kernel
def _correlate(band, bands, partial, dy, x, sizes, stride, top, left):
    P, C, blocks = len(partial), sizes.C, (sizes.C + WIDE - 1) // WIDE
    for item in range(band * P * blocks // bands, (band + 1) * P * blocks // bands):
        part, c0 = item // blocks, item % blocks * WIDE
        sums = partial[part]
        for k in range(sizes.kh * sizes.kw):
            sums[k, c0 : c0 + WIDE] = 0
        for b in range(part * sizes.B // P, (part + 1) * sizes.B // P):
            c = c0
            if c + WIDE <= C:
                _correlate_wide(sums, dy, x, b, c, sizes, stride, top, left)
                continue
            while c + NARROW <= C:
                _correlate_narrow(sums, dy, x, b, c, sizes, stride, top, left)
                c += NARROW
            while c < C:
                _correlate_one(sums, dy, x, b, c, sizes, stride, top, left)
                c += 1


@kernel
def _collect(band, bands, dw, partial):
    (C, K), P = dw.shape, len(partial)
    for k in range(band * K // bands, (band + 1) * K // bands):
        total = partial[0, k]
        for part in range(1, P):
            for c in range(C):
                total[c] += partial[part, k, c]
        for c in range(C):
            dw[c, k] = total[c]


@kernel
def _through_activation(band, bands, dz, dy, pre, low, high, curved):
    first, last = band * len(dy) // bands, (band + 1) * len(dy) // bands
    dz, dy, pre = dz[first:last], dy[first:last], pre[first:last]
    for i in range(len(dy)):
        z = pre[i] * np.float32(1)
        dz[i] = dy[i] * slope_of(z, type(z)(low), type(z)(high), curved)


def _taps(w):
    taps = empty((w[0].size, len(w)), w.dtype)
    launch(_by_tap, 1, taps, w.reshape(len(w), -1))
    return taps


def _sizes(x, y, w):
    (B, H, W, C), (_, U, V, _), (_, kh, kw) = x.shape, y.shape, w.shape
    return Sizes(B, H, W, U, V, kh, kw, C)


def _gather_cpu(y, pre, x, w, bias, up, down, top, left, flip, activation):
    sizes = _sizes(x, y, w)
    arrays = *(a.reshape(-1) for a in (y, y if pre is None else pre, x, _taps(w))), empty((0,), w.dtype) if bias is None else bias
    places = up, down, top, left, flip
    launch(_gather, threads(), *arrays, sizes, *places, pre is not None, *activation_arguments(activation))


def forward_cpu(y, pre, x, w, bias, stride, padding, activation):
    _gather_cpu(y, pre, x, w, bias, stride, 1, padding[0], padding[1], False, activation)


def _dz(dy, pre, activation):
    if activation == "none":
        return dy
    dz = empty(dy.shape, dy.dtype)
    launch(_through_activation, bands_for(dy.size), *(a.reshape(-1) for a in (dz, dy, pre)), *activation_arguments(activation))
    return dz


def backward_cpu(dx, dw, dbias, dy, x, w, pre, stride, padding, activation):
    dz, (C, kh, kw) = _dz(dy, pre, activation), w.shape
    if dx is not None:
        _gather_cpu(dx, None, dz, w, None, 1, stride, kh - 1 - padding[0], kw - 1 - padding[1], True, "none")
    if dw is not None:
        sizes = _sizes(x, dy, w)
        partial = empty((min(PARTS, len(x)), kh * kw, C), w.dtype)
        launch(_correlate, threads(), partial, dz.reshape(-1), x.reshape(-1), sizes, stride, *padding)
        launch(_collect, min(threads(), kh * kw), dw.reshape(C, -1), partial)
    if dbias is not None:
        column_sums(dbias, dz)


# ---------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("depthwise")
TAPS = 9  # of a kernel, whose sums for dw a thread keeps in registers
WARPS = 8  # of a block; each takes every so many-th position


def _gather_cuda(y, pre, x, w, bias, up, down, top, left, flip, activation):
    (B, H, W, C), (_, U, V, _), (_, kh, kw) = x.shape, y.shape, w.shape
    width = vector_width(C, x, y, *(() if pre is None else (pre,)))
    sizes = B, H, W, C, U, V, kh, kw, up, down, top, left, flip
    launch(_source("gather", x.dtype, width), grid_for(y.size // width), y, pre, x, w, bias, *sizes, *activation_arguments(activation))


def forward_cuda(y, pre, x, w, bias, stride, padding, activation):
    _gather_cuda(y, pre, x, w, bias, stride, 1, padding[0], padding[1], False, activation)


def backward_cuda(dx, dw, dbias, dy, x, w, pre, stride, padding, activation):
    (B, H, W, C), (_, U, V, _), (_, kh, kw), (ph, pw), dz = x.shape, dy.shape, w.shape, padding, dy
    if activation != "none":
        dz = empty(dy.shape, dy.dtype, "cuda")
        width = vector_width(dy.size, dz, dy, pre)
        launch(
            _source("through_activation", dy.dtype, width),
            grid_for(dy.size // width),
            dz,
            dy,
            pre,
            dy.size,
            *activation_arguments(activation),
        )
    if dx is not None:
        _gather_cuda(dx, None, dz, w, None, 1, stride, kh - 1 - ph, kw - 1 - pw, True, "none")
    if dw is not None:
        width = vector_width(C, x, dz)
        across, groups, rows = -(-C // (32 * width)), -(-kh * kw // TAPS), B * U * V
        parts = max(1, min(64, -(-rows // (4 * WARPS))))
        partial = empty((parts * WARPS, kh * kw, C), w.dtype, "cuda")
        sizes = B, H, W, C, U, V, kh, kw, stride, ph, pw
        launch(_source("correlate", x.dtype, width, TAPS), Grid(across * groups * parts, 32 * WARPS), partial, dz, x, parts, *sizes)
        launch(_source("collect", w.dtype), grid_for(dw.size), dw, partial, len(partial), kh * kw, C)
    if dbias is not None:
        column_sums_cuda(dbias, dz)


# ---------------------------------------------------------------------------------------------------------------------- spec
def _outputs(x, w, bias, stride, padding, activation):
    require("depthwise", bias=(bias, x[-1:]))
    y = _result_shape(x, w, stride, padding)
    return {"y": y, "pre": None if activation == "none" else y}


def _away_from_kinks(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    """Biases whose results, with the small inputs below, lie where the activation has one slope."""
    if sizes["activation"] == "none":
        return rng.standard_normal(shape)
    return rng.choice([-5.0, -1.5, 1.5, 4.5, 9.0], shape)


def _scaled(scale: float) -> Any:
    """Normal values, small if there is an activation."""
    return lambda rng, shape, sizes: rng.standard_normal(shape) * (1.0 if sizes["activation"] == "none" else scale)


depthwise = Op(
    "depthwise",
    shapes={"x": "B H W C", "w": "C kh kw", "bias": "C"},
    constants={"stride": 1, "padding": (0, 0), "activation": "none"},
    choices={"activation": LIMITS},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    saves=("x", "w", "pre"),
    backward_only=("pre",),
    parameters=("w", "bias"),
    cases=[
        dict(B=2, H=4, W=6, C=5, w="C 3 3", bias=None, padding=(1, 1)),
        dict(B=2, H=5, W=4, C=7, w="C 3 3", padding=(1, 1), activation="hardswish"),
        dict(B=3, H=8, W=9, C=3, w="C 3 2", stride=2, padding=(2, 0), activation="relu6"),
        dict(B=1, H=7, W=8, C=4, w="C 4 5", bias=None, stride=3, padding=(1, 3)),
        dict(B=2, H=3, W=3, C=260, w="C 1 1", bias=None, padding=(1, 0)),
        dict(B=64, H=8, W=8, C=768, w="C 3 3", bias=None, padding=(1, 1)),
    ],
    cost=lambda x, w, bias, stride, padding, _: Cost.of_products(prod(_result_shape(x, w, stride, padding)) * prod(w[1:])),
    values={"x": _scaled(0.3), "w": _scaled(0.1), "bias": _away_from_kinks},
)
