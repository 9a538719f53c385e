"""The matrix product of two blocks on one thread, with an epilogue, used by gemm and attention.

The scheme is that of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008) and BLIS. A tile of C
(`cpu/tiles.py`) is the sum of outer products of a column of A with a row of B:

    for NBLOCK columns of B
        for a slice of the inner dimension                          B's slice is packed into contiguous panels of the tile's width,
            for up to MBLOCK rows of A                              unless `pack` has packed it before; A's block stays in L2
                for a panel of B                                    the panel stays in L1
                    for the rows of a tile: `multiply_tile`
            after the last slice: the epilogue over the block's rows, while they are in L2

If C has the accumulator's type, it holds the partial sums itself; if it is narrower, they are in a separate block. Then, and if a packed B
is small enough to be read again and again, the loop over slices runs inside the loop over blocks of rows. A is read in place if its rows
are contiguous, and packed otherwise. All addresses are int64, strides of A, B and C are in elements, and sizes of tiles in cells: one
number, or several that are adjacent along the inner dimension.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..core.epilogue import BIAS_COLUMN, CONVERT, PADDED
from .compile import compiled_once, routine
from .epilogue import Block, finish
from .kernel import Address, kernel
from .multiply import configure_tiles, multiply_half_rows, multiply_one_vector, multiply_tile, release_tiles
from .operands import NO_EPILOGUE, Epilogue, Matrix, Panels, Size
from .packing import by_rows, cells_of, pack_left, pack_right, panel_offset, sizes, slice_cells
from .tiles import (
    MBLOCK,
    Tile,
    block_rows,
    cell_bytes,
    half_rows,
    is_raw,
    lead_rows,
    row_bytes,
    storage_zero,
    sum_zero,
    tile_per_cell,
    tile_rows,
    tile_step,
    tile_width,
    vector_columns,
)
from .views import call_entry, item_bytes, view

NBLOCK = 768  # columns in a block
NEAR = 2**20  # bytes of a packed B that is read again for each block of rows, so that the block of C stays in L2 instead
TABLE = 32  # int64 words for the arguments of a call; the scratch memory begins with two such tables


# ----------------------------------------------------------------------------------------------------------------------- product
class Tiles(NamedTuple):
    """Tiles of A's rows: their address, and the strides between rows, cells and tiles, in bytes."""

    address: int
    row: int
    cell: int
    tile: int


@routine
def _block(tile, size, a, panels, c, add, edge):
    """c[0:rows, 0:columns] (+)= a · panels over `size.depth` cells, tile by tile; `edge` is the address of a spare tile."""
    compiled_once()
    zero, width, height, depth = sum_zero(tile), tile_width(tile), tile_rows(tile), size.depth
    item = item_bytes(zero)
    for p in range((size.columns + width - 1) // width):
        panel = panels + p * (depth + lead_rows(tile)) * row_bytes(tile)
        columns = min(width, size.columns - p * width)
        for t in range((size.rows + height - 1) // height):
            rows = min(height, size.rows - t * height)
            left, out = a.address + t * a.tile, c.address + (t * height * c.row + p * width) * item
            one_vector = columns <= vector_columns(tile)
            half = rows <= half_rows(tile) and not one_vector  # 65 tokens take 5½ tiles of 12 rows instead of 6
            full = rows == (half_rows(tile) if half else height) and columns == (vector_columns(tile) if one_vector else width)
            target, target_row, accumulate = (out, c.row * item, add) if full else (edge, width * item, 0)
            if one_vector:
                multiply_one_vector(tile, depth, left, a.row, a.cell, rows - 1, panel, target, target_row, accumulate)
            elif half:
                multiply_half_rows(tile, depth, left, a.row, a.cell, rows - 1, panel, target, target_row, accumulate)
            else:
                multiply_tile(tile, depth, left, a.row, a.cell, rows - 1, panel, target, target_row, accumulate)
            if not full:
                for r in range(rows):
                    c_row, spare = view(zero, out + r * c.row * item), view(zero, edge + r * width * item)
                    for j in range(columns):
                        c_row[j] = spare[j] + (c_row[j] if add else zero)


@routine
def _rows_block(tile, scratch, size, cells, a, padded, low, panels, c, add, edge):
    """The same for a block of A's rows in their original layout, over `size.depth` numbers: read in place if possible, else packed."""
    zero, height, cell = storage_zero(tile), tile_rows(tile), cell_bytes(tile)
    item, in_place = item_bytes(zero), 0  # number of rows that are read in place
    if a.column == 1 and is_raw(tile) and (padded or cells * tile_per_cell(tile) == size.depth):
        in_place = size.rows if tile_step(tile) == 1 else size.rows // height * height  # tile instructions would read past A's rows
    start, stop, tiles = 0, in_place, Tiles(a.address, a.row * item, cell, height * a.row * item)
    for rest in range(2):  # a loop, so that `_block` is compiled once
        if rest:
            start, stop = in_place, size.rows
            row, step = (cells * cell, cell) if by_rows(tile, a.column) else (cell, height * cell)
            tiles = Tiles(scratch, row, step, height * cells * cell)
            if start < stop:
                source = Matrix(a.address + in_place * a.row * item, a.row, a.column)
                pack_left(tile, zero, scratch, source, size.rows - in_place, size.depth, cells, low)
        if start < stop:
            c_rows = Matrix(c.address + start * c.row * item_bytes(sum_zero(tile)), c.row, c.column)
            _block(tile, Size(stop - start, size.columns, cells), tiles, panels, c_rows, add, edge)


@kernel
def _product(band, bands, tile, scratch, finishing, size, a, b, packed, c, add, epilogue):
    zero, width, per_cell, panel_row = storage_zero(tile), tile_width(tile), tile_per_cell(tile), row_bytes(tile)
    item, sum_item, flags = item_bytes(zero), item_bytes(sum_zero(tile)), epilogue.flags
    c_item = 2 if flags & CONVERT else sum_item
    cells = cells_of(tile, size.depth)
    slice_depth = slice_cells(tile, cells)
    slices = (cells + slice_depth - 1) // slice_depth
    inside = flags & CONVERT or (packed.address and cells * size.columns * cell_bytes(tile) <= NEAR)
    slices_inside = slices if inside else 1  # slices in the loop inside a block of rows
    parts, terms = (1, 1) if is_raw(tile) else (2, 3)
    max_panels = (min(size.columns, NBLOCK) + width - 1) // width
    panels = scratch.ctypes.data
    left = panels + (0 if packed.address else max_panels * panel_row * parts * min(cells, slice_depth * slices_inside))
    edge = left + (block_rows(tile) + 2 * tile_rows(tile)) * slice_depth * cell_bytes(tile)
    block = edge + tile_rows(tile) * width * sum_item
    configure_tiles(tile)
    for j in range(0, size.columns, NBLOCK):
        columns = min(NBLOCK, size.columns - j)
        panel_count = (columns + width - 1) // width
        for start in range(0, cells, slice_depth * slices_inside):
            span = min(cells - start, slice_depth * slices_inside)
            if not packed.address:
                for k in range(start, start + span, slice_depth):
                    padded = min(slice_depth, cells - k)
                    source = Matrix(b.address + (k * per_cell * b.row + j * b.column) * item, b.row, b.column)
                    depth = min(size.depth - k * per_cell, padded * per_cell)
                    for part in range(parts):
                        target = panels + (part * span + k - start) * panel_count * panel_row
                        pack_right(tile, zero, target, source, depth, columns, padded, part)
            for i in range(0, size.rows, block_rows(tile)):
                rows = min(block_rows(tile), size.rows - i)
                out = Matrix(c.address + (i * c.row + j) * c_item, c.row, c.column)
                values = Matrix(block, panel_count * width, c.column) if flags & CONVERT else out
                for k in range(start, start + span, slice_depth):
                    padded = min(slice_depth, cells - k)
                    block_size = Size(rows, columns, min(size.depth - k * per_cell, padded * per_cell))
                    a_rows = Matrix(a.address + (i * a.row + k * per_cell * a.column) * item, a.row, a.column)
                    for term in range(terms):  # high·high, high·low, low·high
                        right = panels + ((term == 1) * span + k - start) * panel_count * panel_row
                        if packed.address:
                            p = packed.first + j // width
                            right = packed.address + panel_offset(tile, cells, slice_depth, packed.number, term == 1, k, p)
                        accumulate = add or k or term
                        _rows_block(tile, left, block_size, padded, a_rows, flags & PADDED, term == 2, right, values, accumulate, edge)
                if flags & ~PADDED and start + span == cells:
                    bias, offset = epilogue.bias + (j * sum_item if flags & BIAS_COLUMN else 0), (i * epilogue.row + j) * c_item
                    pre, extra, column_scales = epilogue.pre + offset, epilogue.extra + offset, epilogue.column_scales + j * sum_item
                    block_epilogue = Epilogue(flags, bias, pre, extra, epilogue.row, epilogue.row_scales, column_scales)
                    finish(finishing, scratch.ctypes.data - TABLE * 8, Block(i, rows, columns), values, out, block_epilogue)
    release_tiles(tile)


@routine
def product(method, scratch, size, a, b, packed, c, add, epilogue):
    """c = epilogue(a · b [+ c if `add`]), with sizes as in `Size`.

    method: a `Method`. scratch: the 64-byte aligned address of `scratch_bytes` bytes, private to this thread. a, b, c: a `Matrix` each; if
    `packed`, a `Panels`, has an address, b is read from it. Without CONVERT, c has the accumulator's type. Rows of c are contiguous.
    """
    table = view(0, scratch)
    table[0], table[1], table[2], table[3] = 1, scratch + 2 * TABLE * 8, 0, method.finish
    table[4], table[5], table[6] = size.rows, size.columns, size.depth
    table[7], table[8], table[9] = a.address, a.row, a.column
    table[10], table[11], table[12] = b.address, b.row, b.column
    table[13], table[14], table[15] = packed.address, packed.first, packed.number
    table[16], table[17], table[18], table[19] = c.address, c.row, c.column, add
    table[20], table[21], table[22], table[23], table[24] = epilogue.flags, epilogue.bias, epilogue.pre, epilogue.extra, epilogue.row
    table[25], table[26] = epilogue.row_scales, epilogue.column_scales
    call_entry(method.product, 0, scratch)


@routine
def plain_product(method, scratch, size, a, b, c, flags):
    """c = a · b; flags may contain CONVERT and PADDED."""
    product(method, scratch, size, a, b, Panels(0, 0, 0), c, 0, Epilogue(flags, 0, 0, 0, 0, 0, 0))


# --------------------------------------------------------------------------------------------------------------- for the host side
def _types(tile: Tile) -> tuple[Any, ...]:
    """Arguments of `_product` of the right types."""
    matrix = Matrix(0, 0, 0)
    return tile, np.empty(0, np.uint8), 0, Size(0, 0, 0), matrix, matrix, Panels(0, 0, 0), matrix, 0, NO_EPILOGUE


@cache
def product_entry(tile: Tile) -> Address:
    """The compiled product. Kernels call it by address, so that it is compiled once and not into each of them."""
    return Address(_product, _types(tile))


def product_assembly(tile: Tile) -> str:
    """The compiled product in the CPU's assembly language."""
    return _product.assembly(_types(tile))


def scratch_bytes(tile: Tile, rows: int, columns: int, depth: int, packed: bool = False, converts: bool = True) -> int:
    """Bytes of scratch memory that `product` needs, a multiple of 64. packed: whether B is. converts: whether C's type may be narrower."""
    cells, slice_depth, panels = sizes(tile, columns, depth)
    panels = min(panels, NBLOCK // tile.width)
    converts = converts and tile.per_cell > 1
    packed_cells = cells if converts else slice_depth  # with CONVERT all slices of B are packed at once
    right = 0 if packed else panels * tile.row_bytes * packed_cells * (2 if tile.split else 1)
    left = (MBLOCK + 2 * tile.rows) * slice_depth * tile.cell_bytes
    spare = tile.rows * tile.width * tile.accumulator.itemsize
    block = min(rows, MBLOCK) * panels * tile.width * 4 if converts else 0
    return 2 * TABLE * 8 + right + left + spare + block + 63 & ~63
