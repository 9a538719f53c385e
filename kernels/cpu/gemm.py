"""The matrix product of all ops on a CPU, and sums over rows. `gemm` alone decides how a product is computed.

Letters: M rows, N columns, K inner dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from ..core import epilogue
from ..core.arrays import empty, empty_like
from ..core.dtypes import BFLOAT16
from ..core.recording import launch
from .epilogue import finish_entry
from .int8 import pack_rounded, round_rows
from .kernel import kernel
from .operands import Epilogue, Matrix, Method, Panels, Size
from .packing import pack, panel_bytes
from .product import product, product_entry, scratch_bytes
from .run import threads
from .strided import astype, copy
from .tiles import MBLOCK, Tile, host_tile

MIN_BAND_ROWS = 48  # with fewer rows per thread, the columns are divided among the threads
BANDS_EACH = 4  # bands for each thread, of at least a block of rows, so that nobody waits long for a thread that the system suspends
SUM_BATCH, RUNNING = 1, 2  # a product is summed over the batch; it is added to the values in C
SHORTEST = 32  # an inner dimension below it is not multiplied in 8 bits
_thread = threading.local()  # .precision: see `products_in`


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Context manager: in this thread, products of float32 arrays are computed in "float32", "bf16x3" (`cpu/tiles.py`) or "int8".

    In "int8" all products with a matrix of weights are, but those whose result is wanted `exact`; others are in float32.
    """
    previous = getattr(_thread, "precision", "float32")
    _thread.precision = precision
    try:
        yield
    finally:
        _thread.precision = previous


def tile_of(dtype: np.dtype) -> Tile:
    """The tile with which this thread currently multiplies arrays of a dtype, where they are not rounded to 8 bits."""
    split = dtype == np.float32 and getattr(_thread, "precision", "float32") == "bf16x3"
    return host_tile("bf16x3" if split else dtype.name)


def _fit_8_bits(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether this thread currently rounds the operands of a·b."""
    enabled = getattr(_thread, "precision", "float32") == "int8"
    return enabled and {a.dtype, b.dtype, c.dtype} == {np.dtype(np.float32)} and b.ndim == 2 and a.shape[-1] >= SHORTEST


class Steps(NamedTuple):
    """Strides in elements: from one matrix of a batch to the next (0: all share one), between rows, and between columns."""

    batch: int
    row: int
    column: int


class Layout(NamedTuple):
    """How a product is divided among bands, and the element sizes of its arrays."""

    batch: int
    item: int  # bytes per element of a and b
    c_item: int
    bias_item: int
    packed: int  # whether b is packed into panels, all of it before
    width: int  # columns of a panel
    tile_rows: int
    sums: int  # flags SUM_BATCH, RUNNING
    flags: int
    column_bands: int


@kernel
def _gemm(band, bands, method, c, a, b, bias, pre, extra, row_scales, column_scales, scratch, size, a_steps, b_steps, layout):
    row_bands = bands // layout.column_bands
    row_band, column_band = band // layout.column_bands, band % layout.column_bands
    panel_count = (size.columns + layout.width - 1) // layout.width
    first = panel_count * column_band // layout.column_bands
    j = min(size.columns, first * layout.width)
    columns = min(size.columns, panel_count * (column_band + 1) // layout.column_bands * layout.width) - j
    row_tiles = (size.rows + layout.tile_rows - 1) // layout.tile_rows
    tiles = row_tiles if layout.sums & SUM_BATCH else row_tiles * layout.batch
    tile, stop = tiles * row_band // row_bands, tiles * (row_band + 1) // row_bands
    scratch_address = scratch.ctypes.data + band * scratch.shape[1]
    packed = Panels(b.ctypes.data if layout.packed else 0, first, panel_count)
    while tile < stop and columns > 0:
        sample = tile // row_tiles
        last = min(stop, (sample + 1) * row_tiles)
        i = (tile - sample * row_tiles) * layout.tile_rows
        rows = min(size.rows, (last - sample * row_tiles) * layout.tile_rows) - i
        c_offset = ((sample * size.rows + i) * size.columns + j) * layout.c_item
        bias_offset = (j if layout.flags & epilogue.BIAS_COLUMN else i) * layout.bias_item
        part_epilogue = Epilogue(
            layout.flags,
            bias.ctypes.data + bias_offset,
            pre.ctypes.data + c_offset,
            extra.ctypes.data + c_offset,
            size.columns,
            row_scales.ctypes.data + (sample * size.rows + i) * layout.bias_item,
            column_scales.ctypes.data + j * layout.bias_item,
        )
        part_c = Matrix(c.ctypes.data + c_offset, size.columns, 1)
        for part in range(layout.batch if layout.sums & SUM_BATCH else 1):
            index = part if layout.sums & SUM_BATCH else sample
            part_a = Matrix(a.ctypes.data + (index * a_steps.batch + i * a_steps.row) * layout.item, a_steps.row, a_steps.column)
            part_b = Matrix(b.ctypes.data + (index * b_steps.batch + j * b_steps.column) * layout.item, b_steps.row, b_steps.column)
            part_size = Size(rows, columns, size.depth)
            product(method, scratch_address, part_size, part_a, part_b, packed, part_c, part | layout.sums & RUNNING, part_epilogue)
        tile = last


def gemm(
    c: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    sum_batch: bool = False,
    running: np.ndarray | None = None,
    flags: int = 0,
    bias: np.ndarray | None = None,
    pre: np.ndarray | None = None,
    extra: np.ndarray | None = None,
    exact: bool = False,
) -> None:
    """c = epilogue(a·b), optionally with a or b transposed. Each of a, b and c is a matrix or a batch of matrices.

    If one of a and b is bfloat16, the other is rounded to it. c has either type; pre and extra have its shape and type. sum_batch: c is
    one matrix, the sum over the batch, and not bfloat16. running: an array like c, or c itself, to which the product is added. flags, bias,
    pre, extra: the epilogue (`core/epilogue.py`). exact: not in 8 bits. Raises ValueError if flags are combined with sum_batch or running.
    """
    if flags and (sum_batch or running is not None):
        raise ValueError("gemm: a sum over the batch, or with what runs already, has no epilogue")
    if c.dtype == BFLOAT16 and sum_batch:
        raise ValueError("gemm: sums over the batch are not in bfloat16")
    if running is not None and c.dtype == BFLOAT16:  # partial sums are not in bfloat16, so add it in the epilogue
        flags, extra, running = epilogue.RESIDUAL, running, None
    tile = tile_of(BFLOAT16 if BFLOAT16 in (a.dtype, b.dtype) else a.dtype)
    if not (exact or transpose_a or sum_batch or running is not None) and _fit_8_bits(c, a, b):
        tile = host_tile("int8")
    if running is not None and running is not c:
        copy(c, running, (c.size,), (1,), (1,))
    rows, columns = c.shape[-2:]
    size = Size(rows, columns, depth := a.shape[-2] if transpose_a else a.shape[-1])
    batch, shared = max([len(m) for m in (a, b) if m.ndim == 3], default=1), b.ndim == 2
    a_steps = Steps(rows * depth if a.ndim == 3 else 0, *((1, rows) if transpose_a else (depth, 1)))
    b_steps = Steps(0 if shared else depth * columns, *((1, depth) if transpose_b else (columns, 1)))
    by_slices = transpose_a and c.dtype == tile.accumulator and a.ndim == b.ndim == 2  # a gradient of weights, in which b is read once
    packed = shared and not by_slices
    bands, column_bands, all_rows = threads(), 1, rows * (1 if sum_batch else batch)
    while bands % (2 * column_bands) == 0 and (
        all_rows * column_bands < MIN_BAND_ROWS * bands
        or (by_slices and columns * bands > 2 * rows * column_bands**2)  # for each band packs what it reads
    ):
        column_bands *= 2
    if column_bands == 1 and bands > 1 and not by_slices:
        bands = max(bands, min(BANDS_EACH * bands, all_rows // MBLOCK))
    if tile.precision == "bfloat16":
        a, b = astype(a, BFLOAT16), b if packed else astype(b, BFLOAT16)
    row_scales = column_scales = empty((0,), np.float32)
    if tile.precision == "int8":
        rounded, row_scales = round_rows(tile, a.reshape(-1, depth))
        a_steps = Steps(rows * rounded.shape[1] if a.ndim == 3 else 0, rounded.shape[1], 1)
        a, flags = rounded, flags | epilogue.SCALED | epilogue.PADDED
        b, column_scales = pack_rounded(tile, b, b_steps.row, b_steps.column, depth, columns)
    elif packed:  # once for all bands
        panels = empty((panel_bytes(tile, columns, depth),), np.uint8)
        source = b.reshape(-1), b_steps.row, b_steps.column
        launch(pack, min(threads(), -(-columns // tile.width)), tile, panels, *source, depth, columns)
        b = panels
    if c.dtype != tile.accumulator:
        flags |= epilogue.CONVERT
    method = Method(product_entry(tile), finish_entry(tile.accumulator, c.dtype) if flags else 0)
    scratch = empty((bands, scratch_bytes(tile, rows, columns, depth, packed, not by_slices)), np.uint8)
    bias = empty((0,), tile.accumulator) if bias is None else bias
    flags |= epilogue.KEEP if flags & epilogue.GELU and pre is not None else 0
    pre, extra = (c if m is None else m for m in (pre, extra))
    arrays = (
        m.reshape(-1).view(np.uint8) for m in (c, a, b, bias, pre, extra, row_scales, column_scales)
    )  # as bytes: one compilation for all types
    sums = SUM_BATCH * sum_batch | RUNNING * (running is not None)
    items = a.itemsize, c.itemsize, tile.accumulator.itemsize
    layout = Layout(batch, *items, packed, tile.width, tile.rows, sums, flags, column_bands)
    launch(_gemm, bands, method, *arrays, scratch, size, a_steps, b_steps, layout)


@kernel
def _column_sums(band, bands, out, part, x):
    R, C = x.shape
    first, last = C * band // bands, C * (band + 1) // bands
    sums, block_sums = out[first:last], part[first:last]
    for j in range(last - first):
        sums[j] = 0
    for start in range(0, R, 64):  # blocks of rows, so that the rounding error grows with √R
        for j in range(last - first):
            block_sums[j] = 0
        for i in range(start, min(start + 64, R)):
            row = x[i, first:last]
            for j in range(last - first):
                block_sums[j] += row[j]
        for j in range(last - first):
            sums[j] += block_sums[j]


def column_sums(out: np.ndarray, x: np.ndarray) -> None:
    """out (C,) = the sums of x (..., C) over all rows."""
    launch(_column_sums, threads(), out, empty_like(out), x.reshape(-1, x.shape[-1]))


def parameter_gradients(dw: np.ndarray | None, db: np.ndarray | None, dy: np.ndarray, x: np.ndarray, running: np.ndarray | None) -> None:
    """Of y = x·wᵀ + b: dw = dyᵀ·x, to which the running gradient is added, and db = the sums of dy over its rows; either may be None.

    dy (R, O), x (R, C), dw and running (O, C), db (O,).
    """
    if dw is not None:
        gemm(dw, dy, x, transpose_a=True, running=running)
    if db is not None:
        column_sums(db, dy)


@kernel
def _row_sums(band, bands, out, x):
    B, N, C = x.shape
    for i in range(N * band // bands, N * (band + 1) // bands):
        total = x.dtype.type(0)
        for start in range(0, B, 16):  # blocks of samples, so that the rounding error grows with √B
            block_sum = x.dtype.type(0)
            for b in range(start, min(start + 16, B)):
                row_sum = x.dtype.type(0)
                for j in range(C):
                    row_sum += x[b, i, j]
                block_sum += row_sum
            total += block_sum
        out[i] = total


def row_sums(out: np.ndarray, x: np.ndarray) -> None:
    """out (N,) = the sums of x (B, N, C) over samples and channels."""
    launch(_row_sums, threads(), out, x)
