"""Linear attention with exponential features, as in T2T-ViT (Yuan et al., 2101.11986, appendix; Choromanski et al., 2009.14794).

    φ(x)_j = exp(x·w_j - |x|²/2) / √m,   a = vᵀ·φ(k),   s = Σ_t φ(k_t),   d = φ(q)·s + 1e-8,   y = φ(q)·aᵀ / d

With h = dy·a, gradients of the features are

    dφ(q) = h / d - s·(φ(q)·h) / d²,   da = dyᵀ·(φ(q) / d),   ds = -Σ_t φ(q_t)·(φ(q_t)·h_t) / d_t²
    dφ(k) = v·da + ds,   dv = φ(k)·daᵀ

and with z = dφ·φ, dx = z·w - x·Σ z for each of q and k. v is also a result, for the residual connection of the block: its gradient is
added to dv here, where dv is written, and no slice of the packed array is needed.

Two passes, over the keys and over the queries, each read their part of the packed array once. They go through parts of at most PART tokens,
which stay in L2; features are computed again in backward. All but inputs and results is in the accumulator's type.

Letters: B batch, T tokens, E channels, m features, P parts. kqv is (B, T, 3, E), in the authors' order; sums (B, E + 1, m) is a, then s.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .core.arrays import empty
from .core.dtypes import accumulator_dtype
from .core.op import Cost, Float32Output, Implementation, Op, require
from .core.recording import launch
from .cpu import strided as cpu
from .cpu.compile import routine
from .cpu.kernel import kernel
from .cpu.math import exp
from .cpu.operands import Matrix, Method, Size
from .cpu.product import plain_product, product_entry, scratch_bytes
from .cpu.run import threads
from .cpu.tiles import host_tile
from .cpu.views import item_bytes, view, zero_of
from .cuda import strided as cuda
from .cuda.kernel import Grid, Source

EPSILON = 1e-8  # added to the denominator, as in the authors' code
PART = 512  # tokens


def _parts(T):
    return -(-T // PART)


# -------------------------------------------------------------------------------------------------------------------- reference
def _features(x, w):
    return np.exp(x @ w.T - (x * x).sum(-1, keepdims=True) / 2) * len(w) ** -0.5  # (B, T, m)


def forward_reference(y, v, sums, kqv, w):
    k, q, value = kqv.transpose(2, 0, 1, 3)  # (B, T, E)
    phi_k, phi_q = _features(k, w), _features(q, w)
    a, s = value.swapaxes(1, 2) @ phi_k, phi_k.sum(1, keepdims=True)  # (B, E, m), (B, 1, m)
    sums[:, :-1], sums[:, -1:] = a, s
    y[...] = phi_q @ a.swapaxes(1, 2) / ((phi_q * s).sum(-1, keepdims=True) + EPSILON)
    v[...] = value


def backward_reference(dkqv, dy, dv, kqv, w, sums):
    k, q, value = kqv.transpose(2, 0, 1, 3)
    phi_k, phi_q = _features(k, w), _features(q, w)
    a, s = sums[:, :-1], sums[:, -1:]
    dy = np.zeros_like(q) if dy is None else dy
    d = (phi_q * s).sum(-1, keepdims=True) + EPSILON  # (B, T, 1)
    h = dy @ a / d  # (B, T, m)
    dd = -(phi_q * h).sum(-1, keepdims=True) / d
    da, ds = dy.swapaxes(1, 2) @ (phi_q / d), (phi_q * dd).sum(1, keepdims=True)  # (B, E, m), (B, 1, m)
    for i, x, phi, dphi in ((0, k, phi_k, value @ da + ds), (1, q, phi_q, h + s * dd)):
        z = dphi * phi
        dkqv[:, :, i] = z @ w - x * z.sum(-1, keepdims=True)
    dkqv[:, :, 2] = phi_k @ da.swapaxes(1, 2) + (0 if dv is None else dv)


# -------------------------------------------------------------------------------------------------------------------------- CPU
class Blocks(NamedTuple):
    """Where the blocks of one part lie in a band's scratch memory, in bytes: two of features, three of channels."""

    phi: int
    other: int
    rows: int
    x: int
    v: int


@routine
def _widened(zero, number, spare, source, row, count, channels):
    """`count` rows of numbers as a Matrix in the accumulator's type: in place if they have it, otherwise a copy at `spare`."""
    if item_bytes(zero) == item_bytes(number):
        return Matrix(source, row, 1)
    for i in range(count):
        values, out = view(number, source + i * row * item_bytes(number)), view(zero, spare + i * channels * item_bytes(zero))
        for e in range(channels):
            out[e] = values[e]
    return Matrix(spare, channels, 1)


@routine
def _featured(method, scratch, zero, phi, x, w, size):
    """The address phi (tokens, features) = φ(x); size: of the product x·wᵀ."""
    features, item = size.columns, item_bytes(zero)
    plain_product(method, scratch, size, x, Matrix(w, 1, size.depth), Matrix(phi, features, 1), 0)
    for i in range(size.rows):
        row, values, half = view(zero, x.address + i * x.row * item), view(zero, phi + i * features * item), zero
        for e in range(size.depth):
            half += row[e] * row[e]
        half *= type(zero)(0.5)
        for j in range(features):
            values[j] -= half
    values, factor = view(zero, phi), type(zero)(1 / np.sqrt(features))
    for j in range(size.rows * features):  # one loop: the rows are short
        values[j] = exp(values[j]) * factor


@routine
def _written(zero, number, out, row, values, z, x, size):
    """Rows of the gradient: out = values - x·Σ z; size: tokens, channels, features."""
    item = item_bytes(zero)
    for i in range(size.rows):
        target, grads = view(number, out + i * row * item_bytes(number)), view(zero, values + i * size.columns * item)
        terms, source, total = view(zero, z + i * size.depth * item), view(zero, x.address + i * x.row * item), zero
        for j in range(size.depth):
            total += terms[j]
        for e in range(size.columns):
            target[e] = grads[e] - total * source[e]


@kernel
def _keys(band, bands, method, blocks, sums, v_out, kqv, w, scratch):
    """sums (B, P, E + 1, m) of each part, and the copy of v."""
    (B, T, _, E), (m, _), P = kqv.shape, w.shape, sums.shape[1]
    zero, number = zero_of(sums), zero_of(kqv)
    item, size, row = item_bytes(number), item_bytes(zero), 3 * E
    place = scratch.ctypes.data + band * scratch.shape[1]
    phi = place + blocks.phi
    for at in range(B * P * band // bands, B * P * (band + 1) // bands):
        b, first = at // P, at % P * T // P
        count = (at % P + 1) * T // P - first
        source = kqv.ctypes.data + (b * T + first) * row * item
        k = _widened(zero, number, place + blocks.x, source, row, count, E)
        v = _widened(zero, number, place + blocks.v, source + 2 * E * item, row, count, E)
        _featured(method, place, zero, phi, k, w.ctypes.data, Size(count, m, E))
        a = sums.ctypes.data + at * (E + 1) * m * size
        plain_product(method, place, Size(E, m, count), Matrix(v.address, 1, v.row), Matrix(phi, m, 1), Matrix(a, m, 1), 0)
        s = view(zero, a + E * m * size)
        for j in range(m):
            s[j] = zero
        for i in range(count):
            features = view(zero, phi + i * m * size)
            for j in range(m):
                s[j] += features[j]
            values, out = view(number, source + (i * row + 2 * E) * item), view(number, v_out.ctypes.data + (b * T + first + i) * E * item)
            for e in range(E):
                out[e] = values[e]


@kernel
def _queries(band, bands, method, blocks, y, kqv, w, sums, scratch):
    (B, T, _, E), (m, _), P = kqv.shape, w.shape, (kqv.shape[1] + PART - 1) // PART
    zero, number = zero_of(sums), zero_of(kqv)
    item, size, row = item_bytes(number), item_bytes(zero), 3 * E
    place = scratch.ctypes.data + band * scratch.shape[1]
    phi = place + blocks.phi
    for at in range(B * P * band // bands, B * P * (band + 1) // bands):
        b, first = at // P, at % P * T // P
        count = (at % P + 1) * T // P - first
        source = kqv.ctypes.data + ((b * T + first) * row + E) * item
        q = _widened(zero, number, place + blocks.x, source, row, count, E)
        _featured(method, place, zero, phi, q, w.ctypes.data, Size(count, m, E))
        a = sums.ctypes.data + b * (E + 1) * m * size
        s = view(zero, a + E * m * size)
        plain_product(method, place, Size(count, E, m), Matrix(phi, m, 1), Matrix(a, 1, m), Matrix(place + blocks.rows, E, 1), 0)
        for i in range(count):
            features, d = view(zero, phi + i * m * size), zero
            for j in range(m):
                d += features[j] * s[j]
            inverse = type(zero)(1) / (d + type(zero)(EPSILON))
            values, out = view(zero, place + blocks.rows + i * E * size), view(number, y.ctypes.data + (b * T + first + i) * E * item)
            for e in range(E):
                out[e] = values[e] * inverse


@kernel
def _backward_queries(band, bands, method, blocks, dsums, dkqv, dy, kqv, w, sums, scratch):
    """The q third of dkqv, and dsums (B, P, E + 1, m) of each part."""
    (B, T, _, E), (m, _), P = kqv.shape, w.shape, dsums.shape[1]
    zero, number = zero_of(sums), zero_of(kqv)
    item, size, row, one = item_bytes(number), item_bytes(zero), 3 * E, type(zero_of(sums))(1)
    place = scratch.ctypes.data + band * scratch.shape[1]
    phi, other, rows = place + blocks.phi, place + blocks.other, place + blocks.rows
    for at in range(B * P * band // bands, B * P * (band + 1) // bands):
        b, first = at // P, at % P * T // P
        count = (at % P + 1) * T // P - first
        shift = ((b * T + first) * row + E) * item
        q = _widened(zero, number, place + blocks.x, kqv.ctypes.data + shift, row, count, E)
        g = _widened(zero, number, place + blocks.v, dy.ctypes.data + (b * T + first) * E * item, E, count, E)
        _featured(method, place, zero, phi, q, w.ctypes.data, Size(count, m, E))
        a = sums.ctypes.data + b * (E + 1) * m * size
        s = view(zero, a + E * m * size)
        plain_product(method, place, Size(count, m, E), g, Matrix(a, m, 1), Matrix(other, m, 1), 0)
        da = dsums.ctypes.data + at * (E + 1) * m * size
        ds = view(zero, da + E * m * size)
        for j in range(m):
            ds[j] = zero
        for i in range(count):
            features, h, d, dot = view(zero, phi + i * m * size), view(zero, other + i * m * size), zero, zero
            for j in range(m):
                d += features[j] * s[j]
                dot += features[j] * h[j]
            inverse = one / (d + type(zero)(EPSILON))
            dd = -dot * inverse * inverse
            for j in range(m):
                ds[j] += features[j] * dd
                h[j] = (h[j] * inverse + s[j] * dd) * features[j]  # z
                features[j] *= inverse
        plain_product(method, place, Size(E, m, count), Matrix(g.address, 1, g.row), Matrix(phi, m, 1), Matrix(da, m, 1), 0)
        plain_product(method, place, Size(count, E, m), Matrix(other, m, 1), Matrix(w.ctypes.data, E, 1), Matrix(rows, E, 1), 0)
        _written(zero, number, dkqv.ctypes.data + shift, row, rows, other, q, Size(count, E, m))


@kernel
def _backward_keys(band, bands, method, blocks, dkqv, dv, kqv, w, dsums, scratch, skip):
    """The k and v thirds of dkqv; skip: whether the gradient dv of the copy of v is added to the latter."""
    (B, T, _, E), (m, _), P = kqv.shape, w.shape, (kqv.shape[1] + PART - 1) // PART
    zero, number = zero_of(dsums), zero_of(kqv)
    item, size, row = item_bytes(number), item_bytes(zero), 3 * E
    place = scratch.ctypes.data + band * scratch.shape[1]
    phi, other, rows = place + blocks.phi, place + blocks.other, place + blocks.rows
    for at in range(B * P * band // bands, B * P * (band + 1) // bands):
        b, first = at // P, at % P * T // P
        count = (at % P + 1) * T // P - first
        shift = (b * T + first) * row * item
        k = _widened(zero, number, place + blocks.x, kqv.ctypes.data + shift, row, count, E)
        v = _widened(zero, number, place + blocks.v, kqv.ctypes.data + shift + 2 * E * item, row, count, E)
        _featured(method, place, zero, phi, k, w.ctypes.data, Size(count, m, E))
        da = dsums.ctypes.data + b * (E + 1) * m * size
        ds = view(zero, da + E * m * size)
        plain_product(method, place, Size(count, E, m), Matrix(phi, m, 1), Matrix(da, 1, m), Matrix(rows, E, 1), 0)
        for i in range(count):
            values, out = view(zero, rows + i * E * size), view(number, dkqv.ctypes.data + shift + (i * row + 2 * E) * item)
            more = view(number, dv.ctypes.data + (b * T + first + i) * E * item)
            if skip:
                for e in range(E):
                    out[e] = values[e] + more[e]
            else:
                for e in range(E):
                    out[e] = values[e]
        plain_product(method, place, Size(count, m, E), v, Matrix(da, m, 1), Matrix(other, m, 1), 0)
        for i in range(count):
            features, z = view(zero, phi + i * m * size), view(zero, other + i * m * size)
            for j in range(m):
                z[j] = (z[j] + ds[j]) * features[j]
        plain_product(method, place, Size(count, E, m), Matrix(other, m, 1), Matrix(w.ctypes.data, E, 1), Matrix(rows, E, 1), 0)
        _written(zero, number, dkqv.ctypes.data + shift, row, rows, other, k, Size(count, E, m))


def _plan(kqv, w):
    """How products are computed, where blocks lie, and scratch memory for each band."""
    (B, T, _, E), m = kqv.shape, len(w)
    tile, tokens = host_tile(accumulator_dtype(kqv.dtype).name), -(-T // _parts(T))  # also for bf16x3: an exponent has no error to spare
    longest = max(tokens, E, m)
    sizes = [
        scratch_bytes(tile, longest, longest, longest),
        *(-(-tokens * n * tile.accumulator.itemsize // 64) * 64 for n in (m, m, E, E, E)),
    ]
    ends = np.cumsum(sizes).tolist()
    scratch = empty((min(threads(), B * _parts(T)), ends[-1]), np.uint8)
    return Method(product_entry(tile), 0), Blocks(*ends[:-1]), scratch


def _partial(on, sums, T, device="cpu"):
    """Sums of the parts (B, P, E + 1, m), and a function that adds these up to `sums`."""
    B, P = len(sums), _parts(T)
    if P == 1:
        return sums.reshape(B, 1, *sums.shape[1:]), lambda: None
    parts = empty((B, P, *sums.shape[1:]), sums.dtype, device)
    return parts, lambda: on.sum_into(sums.reshape(B, 1, *sums.shape[1:]), parts)


def forward_cpu(y, v, sums, kqv, w):
    method, blocks, scratch = _plan(kqv, w)
    parts, add_up = _partial(cpu, sums, kqv.shape[1])
    launch(_keys, len(scratch), method, blocks, parts, v, kqv, w, scratch)
    add_up()
    launch(_queries, len(scratch), method, blocks, y, kqv, w, sums, scratch)


def backward_cpu(dkqv, dy, dv, kqv, w, sums):
    method, blocks, scratch = _plan(kqv, w)
    dsums = empty(sums.shape, sums.dtype)
    parts, add_up = _partial(cpu, dsums, kqv.shape[1])
    if dy is None:
        dy = empty(dv.shape, dv.dtype)
        cpu.fill(dy, 0.0)
    launch(_backward_queries, len(scratch), method, blocks, parts, dkqv, dy, kqv, w, sums, scratch)
    add_up()
    launch(_backward_keys, len(scratch), method, blocks, dkqv, dy if dv is None else dv, kqv, w, dsums, scratch, dv is not None)


# ------------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("performer")
THREADS = 128  # per block
BLOCK_BYTES = 99 * 1024  # shared memory per block, available on every GPU since compute capability 8.0


def _launch(name, kqv, w, *arrays):
    """Launch a kernel of performer.cu with a block per part, and the largest tile of tokens for which there is shared memory."""
    (B, T, _, E), m = kqv.shape, len(w)
    item = accumulator_dtype(kqv.dtype).itemsize
    fixed, each = (E + 1) * (3 * m + 2), 2 * (E + 1) + 2 * (m + 1) + 1  # numbers of w and sums, and for each token
    tile = next((n for n in (64, 32, 16, 8, 4) if (fixed + n * each) * item <= BLOCK_BYTES), None)
    if tile is None:
        raise UserError(f"performer: {E} channels with {m} features do not fit into a GPU's shared memory: take fewer of either")
    grid = Grid(B * _parts(T), THREADS, (fixed + tile * each) * item)
    launch(_source(name, kqv.dtype), grid, *arrays, kqv, w, _parts(T), T, E, m, tile, EPSILON)


def forward_cuda(y, v, sums, kqv, w):
    parts, add_up = _partial(cuda, sums, kqv.shape[1], "cuda")
    _launch("performer_keys", kqv, w, parts, v)
    add_up()
    _launch("performer_queries", kqv, w, y, sums)


def backward_cuda(dkqv, dy, dv, kqv, w, sums):
    dsums = empty(sums.shape, sums.dtype, "cuda")
    parts, add_up = _partial(cuda, dsums, kqv.shape[1], "cuda")
    _launch("performer_backward_queries", kqv, w, dkqv, parts, dy, sums)
    add_up()
    _launch("performer_backward_keys", kqv, w, dkqv, dv, dsums)


# ------------------------------------------------------------------------------------------------------------------------- spec
def _outputs(kqv, w):
    B, T, _, E = kqv
    require("performer", w=(w, (w[0], E)), kqv=(kqv, (B, T, 3, E)))
    return {"y": (B, T, E), "v": (B, T, E), "sums": Float32Output((B, E + 1, w[0]))}


def _cost(kqv, w):
    products = prod(kqv) // 3 * w[0]  # each of the products of a token with w or with sums
    return Cost(forward=8 * products, backward=16 * products, macs=4 * products + products // kqv[-1])


performer = Op(
    "performer",
    shapes={"kqv": "B T 3 E", "w": "m E"},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    results=("y", "v"),
    gradients=("kqv",),
    saves=("kqv", "w", "sums"),
    parameters=("w",),
    # exponents of about 1/2, since exp multiplies the error of their sums; |x| is about 1
    values={
        "kqv": lambda rng, shape, _: rng.standard_normal(shape) * shape[-1] ** -0.5,
        "w": lambda rng, shape, _: rng.standard_normal(shape) / 2,
    },
    cases=[
        dict(B=2, T=5, E=4, m=3),
        dict(B=3, T=17, E=16, m=8),
        dict(B=1, T=PART + 9, E=8, m=4),
        dict(B=64, T=256, E=64, m=32),
    ],
    cost=_cost,
)
