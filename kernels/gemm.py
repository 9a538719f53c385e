"""Matrix products: `gemm`, the one place that chooses how a product is computed, and the ops `matmul` and `linear`.

    matmul:  y = a·b                        da = dy·bᵀ,  db = aᵀ·dy
    linear:  y = residual + f(x·wᵀ + bias)  with p = x·wᵀ + bias and f the identity or GELU,
             dp = dy·f'(p),  dx = dp·w,  dw = dpᵀ·x,  dbias = Σ dp,  dresidual = dy

Letters: M rows of y, N columns, K the inner length, B batch, T tokens, C channels in, O channels out.
"""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np

from .copying import converted, sum_into
from .cpu import epilogue, kernel, threads
from .cpu.epilogue import finish_entry
from .cpu.packing import pack, panel_bytes
from .cpu.product import product, product_entry, scratch_bytes
from .cpu.tiles import Tile, host_tile
from .cuda.products import gemm_cuda
from .device import BFLOAT16, empty, like, place_of
from .op import Cost, Implementation, Op, Precise, launch, require
from .pointwise import gelu_backward_kernels, gelu_backward_reference, gelu_reference

TALL = 48                                               # rows below which a thread's share is cut by columns rather
_thread = threading.local()                             # .split: whether products of float32 are made of bfloat16 (`splitting`)


# ------------------------------------------------------------------------------------------------------------------ the product
@contextmanager
def split_products(wanted: bool = True) -> Iterator[None]:
    """Inside (in this thread), products of float32 arrays are computed as "bf16x3": `cpu/tiles.py`."""
    before = getattr(_thread, "split", False)
    _thread.split = wanted
    try:
        yield
    finally:
        _thread.split = before


def tile_of(dtype: np.dtype) -> Tile:
    """How this CPU multiplies arrays of a dtype now."""
    split = dtype == np.float32 and getattr(_thread, "split", False)
    return host_tile("bf16x3" if split else dtype.name)


@kernel
def _gemm(band, bands, entry, finish, c, a, b, bias, pre, extra, scratch, item, c_item, bias_item, batch, rows, columns, depth,
          a_batch, a_row, a_column, b_batch, b_row, b_column, panels, width, tall_tile, sum_batch, flags, column_bands):
    row_bands = bands // column_bands
    row_band, column_band = band // column_bands, band % column_bands
    every = (columns + width - 1) // width
    first = every * column_band // column_bands
    j = min(columns, first * width)
    wide = min(columns, every * (column_band + 1) // column_bands * width) - j
    tall_tiles = (rows + tall_tile - 1) // tall_tile
    number = tall_tiles if sum_batch else tall_tiles * batch
    tile, stop = number * row_band // row_bands, number * (row_band + 1) // row_bands
    room = scratch.ctypes.data + band * scratch.shape[1]
    while tile < stop and wide > 0:
        sample = tile // tall_tiles
        last = min(stop, (sample + 1) * tall_tiles)
        i = (tile - sample * tall_tiles) * tall_tile
        tall = min(rows, (last - sample * tall_tiles) * tall_tile) - i
        out = ((sample * rows + i) * columns + j) * c_item
        shift = (j if flags & epilogue.BIAS_COLUMN else i) * bias_item
        for part in range(batch if sum_batch else 1):
            at = part if sum_batch else sample
            right, step, leap = b.ctypes.data + (at * b_batch + j * b_column) * item, b_row, b_column
            if panels:
                right, step, leap = b.ctypes.data, first, every
            product(entry, finish, room, tall, wide, depth, a.ctypes.data + (at * a_batch + i * a_row) * item, a_row, a_column,
                    right, step, leap, panels, c.ctypes.data + out, columns, part, flags, bias.ctypes.data + shift,
                    pre.ctypes.data + out, extra.ctypes.data + out, columns)
        tile = last


def gemm(c, a, b, *, transpose_a=False, transpose_b=False, sum_batch=False, flags=0, bias=None, pre=None, extra=None):
    """c = epilogue(a·b), or of the transposes. Each of a and b is a matrix or a batch of them, c likewise; all on one device.

    a and b of float32, where the other one is bfloat16, are rounded. c is of either type, and pre and extra are of its shape and type.
    sum_batch: c is one matrix, the sum over the batch. flags and bias, pre, extra: the epilogue of `cpu/epilogue.py`.
    """
    if sum_batch and flags:
        raise ValueError("gemm: a sum over the batch has no epilogue")
    if place_of(c) == "cuda":
        gemm_cuda(c, a, b, transpose_a, transpose_b, sum_batch, flags, bias, pre, extra)
        return
    tile = tile_of(BFLOAT16 if BFLOAT16 in (a.dtype, b.dtype) else a.dtype)
    rows, columns = c.shape[-2:]
    depth = a.shape[-2] if transpose_a else a.shape[-1]
    batch = max([len(m) for m in (a, b) if m.ndim == 3], default=1)
    a_row, a_column = (1, rows) if transpose_a else (depth, 1)
    b_row, b_column = (1, depth) if transpose_b else (columns, 1)
    bands, column_bands = threads(), 1
    while bands % (2 * column_bands) == 0 and rows * (1 if sum_batch else batch) * column_bands < TALL * bands:
        column_bands *= 2
    a_batch, b_batch, shared = rows * depth if a.ndim == 3 else 0, depth * columns if b.ndim == 3 else 0, b.ndim == 2
    if tile.precision == "bfloat16":
        a, b = converted(a, BFLOAT16), b if shared else converted(b, BFLOAT16)
    if shared:                                          # packed once, for all bands
        panels = empty((panel_bytes(tile, columns, depth),), np.uint8)
        launch(pack, min(threads(), -(-columns // tile.width)), tile, panels, b.reshape(-1), b_row, b_column, depth, columns)
        b = panels
    finish = 0
    if c.dtype != tile.accumulator:
        flags |= epilogue.CONVERT
    if flags:
        finish = finish_entry(tile.accumulator, c.dtype)
    scratch = empty((bands, scratch_bytes(tile, rows, columns, depth, shared)), np.uint8)
    bias = empty((0,), tile.accumulator) if bias is None else bias
    flags |= epilogue.KEEP if flags & epilogue.GELU and pre is not None else 0
    pre, extra = (c if m is None else m for m in (pre, extra))
    arrays = (m.reshape(-1).view(np.uint8) for m in (c, a, b, bias, pre, extra))       # of any types, compiled once
    launch(_gemm, bands, product_entry(tile), finish, *arrays, scratch, a.itemsize, c.itemsize, tile.accumulator.itemsize, batch, rows,
           columns, depth, a_batch, a_row, a_column, b_batch, b_row, b_column, shared, tile.width, tile.rows, sum_batch, flags,
           column_bands)


@kernel
def _column_sums(band, bands, out, part, x):
    R, C = x.shape
    first, last = C * band // bands, C * (band + 1) // bands
    sums, some = out[first:last], part[first:last]
    for j in range(last - first):
        sums[j] = 0
    for start in range(0, R, 64):                       # rows at a time, so that roundings grow with the root of R
        for j in range(last - first):
            some[j] = 0
        for i in range(start, min(start + 64, R)):
            row = x[i, first:last]
            for j in range(last - first):
                some[j] += row[j]
        for j in range(last - first):
            sums[j] += some[j]


def column_sums(out, x):
    """out (C,) = the sums of x (..., C) over all rows."""
    if place_of(x) == "cuda":
        sum_into(out, x.reshape(-1, x.shape[-1]))
        return
    launch(_column_sums, threads(), out, like(out), x.reshape(-1, x.shape[-1]))


# ----------------------------------------------------------------------------------------------------------------------- matmul
def _swapped(x):
    return x.swapaxes(-1, -2)


def matmul_forward_reference(y, a, b):
    y[...] = a @ b


def matmul_backward_reference(da, db, dy, a, b):
    if da is not None:
        da[...] = dy @ _swapped(b)
    if db is not None:
        db[...] = _flat(a, b).T @ _flat(dy, b) if b.ndim == 2 else _swapped(a) @ dy


def _flat(x, b):
    """A batch of matrices as one matrix where b is one, as a plain batch otherwise."""
    return x.reshape(-1, x.shape[-1]) if b.ndim == 2 else x.reshape(-1, *x.shape[-2:])


def matmul_forward_kernels(y, a, b):
    gemm(_flat(y, b), _flat(a, b), _flat(b, b))


def matmul_backward_kernels(da, db, dy, a, b):
    if da is not None:
        gemm(_flat(da, b), _flat(dy, b), _flat(b, b), transpose_b=True)
    if db is not None:
        gemm(_flat(db, b), _flat(a, b), _flat(dy, b), transpose_a=True)


def _matmul_outputs(a, b):
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2] or (len(b) > 2 and a[:-2] != b[:-2]):
        raise ValueError(f"matmul: (..., M, K) and (K, N) or (..., K, N) with equal leading lengths, not {a} and {b}")
    return {"y": (*a[:-1], b[-1])}


def _cost(products):
    return Cost(forward=2 * products, backward=4 * products, macs=products)


matmul = Op(
    "matmul",
    shapes={"a": "B M K", "b": "B K N"},
    outputs=_matmul_outputs,
    forward=Implementation(matmul_forward_reference, matmul_forward_kernels, matmul_forward_kernels),
    backward=Implementation(matmul_backward_reference, matmul_backward_kernels, matmul_backward_kernels),
    saves=("a", "b"),
    cases=[dict(B=3, M=7, K=5, N=9), dict(B=2, M=130, K=300, N=40), dict(B=2, M=33, K=17, N=50, b="K N"), dict(B=4, M=197, K=64, N=197)],
    cost=lambda a, b: _cost(prod(a) * b[-1]),
)


# ----------------------------------------------------------------------------------------------------------------------- linear
ACTIVATIONS = {"none": 0, "gelu": epilogue.GELU, "gelu_tanh": epilogue.GELU | epilogue.TANH}
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def forward_reference(y, pre, x, weight, bias, residual, activation, precise):
    p = x @ weight.T if bias is None else x @ weight.T + bias           # (B, T, O)
    y[...] = p
    if pre is not None:
        pre[...] = p
    if activation != "none":
        gelu_reference(y, p, APPROXIMATE[activation])
    if residual is not None:
        y += residual


def backward_reference(dx, dweight, dbias, dy, x, weight, pre, activation, precise):
    dp = dy                                             # (B, T, O)
    if activation != "none":
        dp = np.empty_like(dy)
        gelu_backward_reference(dp, dy, pre, APPROXIMATE[activation])
    rows = dp.reshape(-1, dp.shape[-1])                 # (B·T, O)
    if dx is not None:
        dx[...] = dp @ weight
    if dweight is not None:
        dweight[...] = rows.T @ x.reshape(-1, x.shape[-1])
    if dbias is not None:
        dbias[...] = rows.sum(0)


def _rows(x):
    return None if x is None else x.reshape(-1, x.shape[-1])


def forward_kernels(y, pre, x, weight, bias, residual, activation, precise):
    flags = ACTIVATIONS[activation]
    flags |= epilogue.BIAS_COLUMN if bias is not None else 0
    flags |= epilogue.RESIDUAL if residual is not None else 0
    gemm(_rows(y), _rows(x), weight, transpose_b=True, flags=flags, bias=bias, pre=_rows(pre), extra=_rows(residual))


def backward_kernels(dx, dweight, dbias, dy, x, weight, pre, activation, precise):
    dp = converted(dy, x.dtype)
    if activation != "none":
        dp = like(dy)
        gelu_backward_kernels(dp, dy, pre, APPROXIMATE[activation])
    if dx is not None:
        gemm(_rows(dx), _rows(dp), weight)
    if dweight is not None:
        gemm(dweight, _rows(dp), _rows(x), transpose_a=True)
    if dbias is not None:
        column_sums(dbias, dp)


def _linear_outputs(x, weight, bias, residual, activation, precise):
    if precise and (activation != "none" or residual is not None):
        raise ValueError("linear: a precise result has no activation and no residual")
    if x[-1] != weight[1]:
        raise ValueError(f"linear: x has {x[-1]} channels, the weight of shape {weight} takes {weight[1]}")
    y = (*x[:-1], weight[0])
    require("linear", bias=(bias, weight[:1]), residual=(residual, y))
    return {"y": Precise(y) if precise else y, "pre": None if activation == "none" else y}


linear = Op(
    "linear",
    shapes={"x": "B T C", "weight": "O C", "bias": "O", "residual": "B T O"},
    constants={"activation": "none", "precise": False},
    outputs=_linear_outputs,
    forward=Implementation(forward_reference, forward_kernels, forward_kernels),
    backward=Implementation(backward_reference, backward_kernels, backward_kernels),
    saves=("x", "weight", "pre"),
    backward_only=("pre",),
    parameters=("weight", "bias"),
    multiplied=("weight", "bias"),
    same={"residual": "dy"},
    cases=[dict(B=2, T=5, C=7, O=3), dict(B=2, T=5, C=7, O=3, bias=None, residual=None), dict(B=3, T=37, C=40, O=50, activation="gelu"),
           dict(B=2, T=9, C=33, O=19, activation="gelu_tanh", residual=None),
           dict(B=3, T=1, C=40, O=10, residual=None, precise=True),
           dict(B=64, T=65, C=192, O=768, activation="gelu", residual=None), dict(B=64, T=65, C=768, O=192)],
    cost=lambda x, weight, *_: _cost(prod(x) * weight[0]),
)
