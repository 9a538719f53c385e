"""Products that are known to be symmetric, such as x·xᵀ, or two polynomials of one symmetric matrix: half of the multiply-adds of `gemm`.

A block of rows of c is computed up to its last diagonal element, by the product that `gemm` also uses, and transposed into the rows above.
Blocks are computed in pairs of a short and a long one, so that all pairs have about the same work.

Letters: B batch, N rows and columns of c, K inner dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..core.arrays import empty
from ..core.recording import launch
from .compile import routine
from .gemm import BANDS_EACH, Steps, tile_of
from .kernel import kernel
from .operands import NO_EPILOGUE, Matrix, Method, Panels, Size
from .packing import cells_of, pack_right, panel_bytes, panel_offset, slice_cells, transpose_cells
from .product import product, product_entry, scratch_bytes
from .run import threads
from .tiles import host_tile, is_raw, storage_zero, sum_zero, tile_lanes, tile_per_cell, tile_width
from .views import item_bytes, view, zero_of

ROWS = 24  # at least, in a block: fewer rows leave out more of the upper half, and read the panels more often


class Layout(NamedTuple):
    """How the work is divided, and where the parts of a band's scratch memory begin, in bytes."""

    batch: int
    rows: int  # of a block
    unit: int  # pairs of blocks that a band computes together
    panels: int  # where b is packed
    block: int  # where a block of c is summed


class Terms(NamedTuple):
    """c = product·(a·b) + extra·e + diagonal·I."""

    product: float
    extra: float
    diagonal: float


@routine
def _pack_whole(tile, panels, b, depth, columns):
    """Pack b (depth, columns) as `packing.pack` does."""
    zero, per_cell, panel_count = storage_zero(tile), tile_per_cell(tile), (columns + tile_width(tile) - 1) // tile_width(tile)
    cells = cells_of(tile, depth)
    slice_depth = slice_cells(tile, cells)
    for part in range(1 if is_raw(tile) else 2):
        for k in range(0, cells, slice_depth):
            padded = min(slice_depth, cells - k)
            source = Matrix(b.address + k * per_cell * b.row * item_bytes(zero), b.row, b.column)
            target = panels + panel_offset(tile, cells, slice_depth, panel_count, part, k, 0)
            pack_right(tile, zero, target, source, min(depth - k * per_cell, padded * per_cell), columns, padded, part)


@routine
def _finish(mover, values, c, e, start, size, first, rows, terms):
    """From the products in `values` (rows, first + rows): rows `first` ... of the matrix at element `start` of c, and their transpose."""
    number, item, lanes = type(values[0]), item_bytes(values[0]), tile_lanes(mover)
    factor, extra, columns = number(terms.product), number(terms.extra), first + rows
    for r in range(rows):
        row, at = r * columns, start + (first + r) * size
        if len(e):
            for j in range(columns):
                values[np.uint64(row + j)] = factor * values[np.uint64(row + j)] + extra * e[np.uint64(at + j)]
        elif factor != 1:
            for j in range(columns):
                values[np.uint64(row + j)] *= factor
        values[row + first + r] += number(terms.diagonal)
        for j in range(first + r + 1):
            c[np.uint64(at + j)] = values[np.uint64(row + j)]
    moved = rows // lanes * lanes if item == 4 and item_bytes(zero_of(c)) == 4 else 0  # rows of whole squares, as are columns up to `whole`
    whole = first // lanes * lanes if moved else 0
    for j in range(0, whole, lanes):
        for r in range(0, moved, lanes):
            target, source = c.ctypes.data + (start + j * size + first + r) * item, values.ctypes.data + (r * columns + j) * item
            transpose_cells(mover, np.float32(0), target, size * item, source, columns * item, 0)
    for j in range(columns):
        at = start + j * size + first
        for r in range(moved if j < whole else max(0, j - first + 1), rows):
            c[np.uint64(at + r)] = values[np.uint64(r * columns + j)]


@kernel
def _symmetric(band, bands, method, tile, mover, c, a, b, e, scratch, size, a_steps, b_steps, layout, terms):
    N, rows, item = size.rows, layout.rows, item_bytes(storage_zero(tile))
    blocks, panel_count = (N + rows - 1) // rows, (N + tile_width(tile) - 1) // tile_width(tile)
    pairs = (blocks + 1) // 2
    units = layout.batch * pairs // layout.unit
    scratch_address = scratch.ctypes.data + band * scratch.shape[1]
    values, panels = scratch_address + layout.block, scratch_address + layout.panels
    packed = -1
    for pair in range(units * band // bands * layout.unit, units * (band + 1) // bands * layout.unit):
        sample = pair // pairs
        if sample != packed:
            b_matrix = Matrix(b.ctypes.data + sample * b_steps.batch * item, b_steps.row, b_steps.column)
            _pack_whole(tile, panels, b_matrix, size.depth, N)
            packed = sample
        for block in (pair - sample * pairs, blocks - 1 - pair + sample * pairs):
            first = block * rows
            count = min(rows, N - first)
            part_a = Matrix(a.ctypes.data + (sample * a_steps.batch + first * a_steps.row) * item, a_steps.row, a_steps.column)
            part_c, part_size = Matrix(values, first + count, 1), Size(count, first + count, size.depth)
            product(method, scratch_address, part_size, part_a, b_matrix, Panels(panels, 0, panel_count), part_c, 0, NO_EPILOGUE)
            _finish(mover, view(sum_zero(tile), values), c, e, sample * N * N, N, first, count, terms)
            if 2 * block == blocks - 1:  # the middle one, alone
                break


def symmetric_product(
    c: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    scale: float = 1.0,
    extra: np.ndarray | None = None,
    extra_scale: float = 1.0,
    diagonal: float = 0.0,
) -> None:
    """c = scale·(a·b) + extra_scale·extra + diagonal·I for a batch of symmetric products: c and extra (B, N, N), all of one dtype.

    a is (B, N, K), or (B, K, N) with `transpose_a`; b is (B, K, N), or (B, N, K) with `transpose_b`. c is none of the other arrays, and
    symmetric to the bit.
    """
    tile = tile_of(a.dtype)
    batch, N, _ = c.shape
    depth = a.shape[1] if transpose_a else a.shape[2]
    a_steps = Steps(N * depth, *((1, N) if transpose_a else (depth, 1)))
    b_steps = Steps(N * depth, *((1, depth) if transpose_b else (N, 1)))
    rows = -(-ROWS // tile.rows) * tile.rows
    pairs, bands = (-(-N // rows) + 1) // 2, BANDS_EACH * threads()
    unit = pairs if batch >= bands else 1  # b is packed once for each matrix of a band
    panels = scratch_bytes(tile, rows, N, depth, packed=True)
    block = panels + panel_bytes(tile, N, depth)
    scratch = empty((min(bands, batch * pairs // unit), block + (rows * N * tile.accumulator.itemsize + 63 & ~63)), np.uint8)
    a, b = (m.reshape(-1).view(np.uint8) for m in (a, b))
    e = empty((0,), c.dtype) if extra is None else extra.reshape(-1)
    layout, terms = Layout(batch, rows, unit, panels, block), Terms(float(scale), float(extra_scale), float(diagonal))
    size, method = Size(N, N, depth), Method(product_entry(tile), 0)
    launch(
        _symmetric, len(scratch), method, tile, host_tile("float32"), c.reshape(-1), a, b, e, scratch, size, a_steps, b_steps, layout, terms
    )
