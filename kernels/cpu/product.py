"""The product of two blocks of matrices on one thread, with an epilogue; what gemm, attention and mixing are made of.

The scheme is that of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008) and BLIS. A tile of C
(`cpu/tiles.py`) is the sum of outer products of a column of A with a row of B:

    for NBLOCK columns of B
        for a slice of the inner dimension                          B's slice is packed into panels of a tile's width, each contiguous,
            for up to MBLOCK rows of A                              unless `pack` has done so; A's block stays in L2
                for a panel of B                                    which stays in L1
                    for the rows of a tile: `multiply_tile`
            after the last slice: the epilogue over the block's rows, while they are in L2

Where C is of the accumulator's type, sums lie in C itself; where it is narrower, in a block of their own, and the slices run inside the
blocks of rows. A is read where it lies when its rows are contiguous, and packed otherwise. All addresses are int64, strides of A, B and C
count elements, and everything about a tile is in cells: a number, or two bfloat16 of one column of A's row.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from ..core.epilogue import BIAS_COLUMN, CONVERT, PADDED
from .compile import routine
from .epilogue import Block, finish
from .kernel import kernel
from .multiply import configure_tiles, multiply_half_rows, multiply_one_vector, multiply_tile, release_tiles
from .operands import Epilogue, Matrix, Panels, Size
from .packing import by_rows, cells_of, pack_left, pack_right, sizes, slice_cells
from .run import call_entry
from .tiles import (
    MBLOCK,
    Tile,
    block_rows,
    cell_bytes,
    half_rows,
    is_raw,
    row_bytes,
    storage_zero,
    sum_zero,
    tile_pairs,
    tile_rows,
    tile_step,
    tile_width,
    vector_columns,
)
from .views import item_bytes, view

NBLOCK = 768  # columns of a block
TABLE = 32  # int64 for the arguments of a call; two such tables begin the scratch


# ----------------------------------------------------------------------------------------------------------------------- product
class Tiles(NamedTuple):
    """Tiles of A's rows, in bytes: where they begin, from row to row, from cell to cell, from tile to tile."""

    address: int
    row: int
    cell: int
    tile: int


@routine
def _block(tile, size, a, panels, c, add, edge):
    """c[0:rows, 0:columns] (+)= a · panels, tile by tile, `size.depth` cells deep; `edge` is the address of a spare tile."""
    zero, width, tall, depth = sum_zero(tile), tile_width(tile), tile_rows(tile), size.depth
    item = item_bytes(zero)
    for p in range((size.columns + width - 1) // width):
        panel = panels + p * depth * row_bytes(tile)
        wide = min(width, size.columns - p * width)
        for t in range((size.rows + tall - 1) // tall):
            valid = min(tall, size.rows - t * tall)
            left, out = a.address + t * a.tile, c.address + (t * tall * c.row + p * width) * item
            one_vector = wide <= vector_columns(tile)
            half = valid <= half_rows(tile) and not one_vector  # 65 tokens are 5½ tiles of 12 rows rather than 6
            whole = valid == (half_rows(tile) if half else tall) and wide == (vector_columns(tile) if one_vector else width)
            to, to_row, adding = (out, c.row * item, add) if whole else (edge, width * item, 0)
            if one_vector:
                multiply_one_vector(tile, depth, left, a.row, a.cell, valid - 1, panel, to, to_row, adding)
            elif half:
                multiply_half_rows(tile, depth, left, a.row, a.cell, valid - 1, panel, to, to_row, adding)
            else:
                multiply_tile(tile, depth, left, a.row, a.cell, valid - 1, panel, to, to_row, adding)
            if not whole:
                for r in range(valid):
                    line, spare = view(zero, out + r * c.row * item), view(zero, edge + r * width * item)
                    for j in range(wide):
                        line[j] = spare[j] + (line[j] if add else zero)


@routine
def _rows_block(tile, scratch, size, cells, a, padded, low, panels, c, add, edge):
    """The same for a block of rows of A as it lies in memory, `size.depth` numbers deep: read there, where that works, or packed."""
    zero, tall, cell = storage_zero(tile), tile_rows(tile), cell_bytes(tile)
    item, in_place = item_bytes(zero), 0  # rows that are read where they lie
    if a.column == 1 and is_raw(tile) and (padded or cells * tile_pairs(tile) == size.depth):
        in_place = size.rows if tile_step(tile) == 1 else size.rows // tall * tall  # tile instructions would read rows that are not A's
    start, stop, tiles = 0, in_place, Tiles(a.address, a.row * item, cell, tall * a.row * item)
    for rest in range(2):  # a loop, so that the tiles are compiled once
        if rest:
            start, stop = in_place, size.rows
            row, step = (cells * cell, cell) if by_rows(tile, a.column) else (cell, tall * cell)
            tiles = Tiles(scratch, row, step, tall * cells * cell)
            if start < stop:
                source = Matrix(a.address + in_place * a.row * item, a.row, a.column)
                pack_left(tile, zero, scratch, source, size.rows - in_place, size.depth, cells, low)
        if start < stop:
            out = Matrix(c.address + start * c.row * item_bytes(sum_zero(tile)), c.row, c.column)
            _block(tile, Size(stop - start, size.columns, cells), tiles, panels, out, add, edge)


@kernel
def _product(band, bands, tile, scratch, finishing, size, a, b, packed, c, add, epilogue):
    zero, width, pairs, line = storage_zero(tile), tile_width(tile), tile_pairs(tile), row_bytes(tile)
    item, sum_item, flags = item_bytes(zero), item_bytes(sum_zero(tile)), epilogue.flags
    c_item = 2 if flags & CONVERT else sum_item
    cells = cells_of(tile, size.depth)
    deepest = slice_cells(tile, cells)
    slices = (cells + deepest - 1) // deepest
    inside = slices if flags & CONVERT else 1  # slices that run inside a block of rows
    parts, rounds = (1, 1) if is_raw(tile) else (2, 3)
    most = (min(size.columns, NBLOCK) + width - 1) // width
    panels = scratch.ctypes.data
    left = panels + (0 if packed.address else most * line * parts * min(cells, deepest * inside))
    edge = left + (block_rows(tile) + 2 * tile_rows(tile)) * deepest * cell_bytes(tile)
    block = edge + tile_rows(tile) * width * sum_item
    configure_tiles(tile)
    for j in range(0, size.columns, NBLOCK):
        wide = min(NBLOCK, size.columns - j)
        number = (wide + width - 1) // width
        for start in range(0, cells, deepest * inside):
            span = min(cells - start, deepest * inside)
            if not packed.address:
                for k in range(start, start + span, deepest):
                    padded = min(deepest, cells - k)
                    source = Matrix(b.address + (k * pairs * b.row + j * b.column) * item, b.row, b.column)
                    deep = min(size.depth - k * pairs, padded * pairs)
                    for part in range(parts):
                        pack_right(tile, zero, panels + (part * span + k - start) * number * line, source, deep, wide, padded, part)
            for i in range(0, size.rows, block_rows(tile)):
                tall = min(block_rows(tile), size.rows - i)
                out = Matrix(c.address + (i * c.row + j) * c_item, c.row, c.column)
                values = Matrix(block, number * width, c.column) if flags & CONVERT else out
                for k in range(start, start + span, deepest):
                    padded = min(deepest, cells - k)
                    rows_size = Size(tall, wide, min(size.depth - k * pairs, padded * pairs))
                    rows = Matrix(a.address + (i * a.row + k * pairs * a.column) * item, a.row, a.column)
                    for turn in range(rounds):  # high·high, high·low, low·high
                        right = panels + ((turn == 1) * span + k - start) * number * line
                        if packed.address:
                            panel = (packed.first + j // width) * padded
                            right = packed.address + (((turn == 1) * cells + k) * packed.number + panel) * line
                        adding = add or k or turn
                        _rows_block(tile, left, rows_size, padded, rows, flags & PADDED, turn == 2, right, values, adding, edge)
                if flags & ~PADDED and start + span == cells:
                    bias, other = epilogue.bias + (j * sum_item if flags & BIAS_COLUMN else 0), (i * epilogue.row + j) * c_item
                    after = Epilogue(flags, bias, epilogue.pre + other, epilogue.extra + other, epilogue.row)
                    finish(finishing, scratch.ctypes.data - TABLE * 8, Block(i, tall, wide), values, out, after)
    release_tiles(tile)


@routine
def product(method, room, size, a, b, packed, c, add, epilogue):
    """c = epilogue(a · b [+ c where `add`]), of the sizes that `Size` names.

    method: a `Method`; room: the address of `scratch_bytes` bytes, 64-byte aligned, for this thread alone. a, b, c: a `Matrix` each; where
    `packed`, a `Panels`, has an address, b is read from it. Without CONVERT, c is of the accumulator's type; its rows are contiguous.
    """
    table = view(0, room)
    table[0], table[1], table[2], table[3] = 1, room + 2 * TABLE * 8, 0, method.finish
    table[4], table[5], table[6] = size.rows, size.columns, size.depth
    table[7], table[8], table[9] = a.address, a.row, a.column
    table[10], table[11], table[12] = b.address, b.row, b.column
    table[13], table[14], table[15] = packed.address, packed.first, packed.number
    table[16], table[17], table[18], table[19] = c.address, c.row, c.column, add
    table[20], table[21], table[22], table[23], table[24] = epilogue.flags, epilogue.bias, epilogue.pre, epilogue.extra, epilogue.row
    call_entry(method.product, 0, room)


@routine
def plain_product(method, room, size, a, b, c, flags):
    """c = a · b; flags: CONVERT or PADDED, both or neither."""
    product(method, room, size, a, b, Panels(0, 0, 0), c, 0, Epilogue(flags, 0, 0, 0, 0))


# --------------------------------------------------------------------------------------------------------------- for the host side
@cache
def product_entry(tile: Tile) -> int:
    """The address of the compiled product, which kernels are handed: so it is compiled once, not into each of them."""
    matrix = Matrix(0, 0, 0)
    arguments = tile, np.empty(0, np.uint8), 0, Size(0, 0, 0), matrix, matrix, Panels(0, 0, 0), matrix, 0, Epilogue(0, 0, 0, 0, 0)
    return _product.prepare(1, arguments)[0]


def scratch_bytes(tile: Tile, rows: int, columns: int, depth: int, packed: bool = False) -> int:
    """Room that `product` needs for its packed blocks, a multiple of 64 bytes."""
    cells, deepest, panels = sizes(tile, columns, depth)
    panels = min(panels, NBLOCK // tile.width)
    most = cells if tile.pairs == 2 else deepest  # with CONVERT all slices of B are packed at once
    right = 0 if packed else panels * tile.row_bytes * most * (2 if tile.split else 1)
    left = (MBLOCK + 2 * tile.rows) * deepest * tile.cell_bytes
    spare = tile.rows * tile.width * tile.accumulator.itemsize
    block = min(rows, MBLOCK) * panels * tile.width * 4 if tile.pairs == 2 else 0
    return 2 * TABLE * 8 + right + left + spare + block + 63 & ~63
