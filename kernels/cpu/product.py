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

import numpy as np

from ..core.epilogue import BIAS_COLUMN, CONVERT, PADDED
from .compile import routine
from .epilogue import finish
from .kernel import kernel
from .multiply import configure_tiles, multiply_half_rows, multiply_one_vector, multiply_tile, release_tiles
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
TABLE = 24  # int64 for the arguments of a call; two such tables begin the scratch


# ----------------------------------------------------------------------------------------------------------------------- product
@routine
def _block(tile, rows, columns, depth, a, a_row, a_step, a_tile, panels, c, c_row, add, edge):
    """c[0:rows, 0:columns] (+)= a · panels, tile by tile; tiles of a are a_tile bytes apart; `edge` is the address of a spare tile."""
    zero, width, tall = sum_zero(tile), tile_width(tile), tile_rows(tile)
    item = item_bytes(zero)
    for p in range((columns + width - 1) // width):
        panel = panels + p * depth * row_bytes(tile)
        wide = min(width, columns - p * width)
        for t in range((rows + tall - 1) // tall):
            valid = min(tall, rows - t * tall)
            out = c + (t * tall * c_row + p * width) * item
            one_vector = wide <= vector_columns(tile)
            half = valid <= half_rows(tile) and not one_vector  # 65 tokens are 5½ tiles of 12 rows rather than 6
            whole = valid == (half_rows(tile) if half else tall) and wide == (vector_columns(tile) if one_vector else width)
            to, to_row, adding = (out, c_row * item, add) if whole else (edge, width * item, 0)
            if one_vector:
                multiply_one_vector(tile, depth, a + t * a_tile, a_row, a_step, valid - 1, panel, to, to_row, adding)
            elif half:
                multiply_half_rows(tile, depth, a + t * a_tile, a_row, a_step, valid - 1, panel, to, to_row, adding)
            else:
                multiply_tile(tile, depth, a + t * a_tile, a_row, a_step, valid - 1, panel, to, to_row, adding)
            if not whole:
                for r in range(valid):
                    line, spare = view(zero, out + r * c_row * item), view(zero, edge + r * width * item)
                    for j in range(wide):
                        line[j] = spare[j] + (line[j] if add else zero)


@routine
def _rows_block(tile, packed, rows, columns, depth, cells, a, a_row, a_column, padded, low, panels, c, c_row, add, edge):
    """The same for a block of rows of A as it lies in memory: there, where that works, or packed."""
    zero, tall, cell = storage_zero(tile), tile_rows(tile), cell_bytes(tile)
    item, there = item_bytes(zero), 0  # rows that are read where they lie
    if a_column == 1 and is_raw(tile) and (padded or cells * tile_pairs(tile) == depth):
        there = rows if tile_step(tile) == 1 else rows // tall * tall  # tile instructions would read rows that are not A's
    start, stop, source, row, step, leap = 0, there, a, a_row * item, cell, tall * a_row * item
    for rest in range(2):  # a loop, so that the tiles are compiled once
        if rest:
            start, stop, source, leap = there, rows, packed, tall * cells * cell
            row, step = (cells * cell, cell) if by_rows(tile, a_column) else (cell, tall * cell)
            if start < stop:
                pack_left(tile, zero, packed, a + there * a_row * item, a_row, a_column, rows - there, depth, cells, low)
        if start < stop:
            _block(
                tile,
                stop - start,
                columns,
                cells,
                source,
                row,
                step,
                leap,
                panels,
                c + start * c_row * item_bytes(sum_zero(tile)),
                c_row,
                add,
                edge,
            )


@kernel
def _product(
    band,
    bands,
    tile,
    scratch,
    finishing,
    rows,
    columns,
    depth,
    a,
    a_row,
    a_column,
    b,
    b_row,
    b_column,
    packed,
    c,
    c_row,
    add,
    flags,
    bias,
    pre,
    extra,
    other_row,
):
    zero, width, pairs, line = storage_zero(tile), tile_width(tile), tile_pairs(tile), row_bytes(tile)
    item, size = item_bytes(zero), item_bytes(sum_zero(tile))
    c_item = 2 if flags & CONVERT else size
    cells = cells_of(tile, depth)
    deepest = slice_cells(tile, cells)
    slices = (cells + deepest - 1) // deepest
    inside = slices if flags & CONVERT else 1  # slices that run inside a block of rows
    parts, rounds = (1, 1) if is_raw(tile) else (2, 3)
    most = (min(columns, NBLOCK) + width - 1) // width
    panels = scratch.ctypes.data
    left = panels + (0 if packed else most * line * parts * min(cells, deepest * inside))
    edge = left + (block_rows(tile) + 2 * tile_rows(tile)) * deepest * cell_bytes(tile)
    block = edge + tile_rows(tile) * width * size
    configure_tiles(tile)
    for j in range(0, columns, NBLOCK):
        wide = min(NBLOCK, columns - j)
        number = (wide + width - 1) // width
        for start in range(0, cells, deepest * inside):
            span = min(cells - start, deepest * inside)
            if not packed:
                for k in range(start, start + span, deepest):
                    padded = min(deepest, cells - k)
                    for part in range(parts):
                        pack_right(
                            tile,
                            zero,
                            panels + (part * span + k - start) * number * line,
                            b + (k * pairs * b_row + j * b_column) * item,
                            b_row,
                            b_column,
                            min(depth - k * pairs, padded * pairs),
                            wide,
                            padded,
                            part,
                        )
            for i in range(0, rows, block_rows(tile)):
                tall = min(block_rows(tile), rows - i)
                out = c + (i * c_row + j) * c_item
                values, values_row = (block, number * width) if flags & CONVERT else (out, c_row)
                for k in range(start, start + span, deepest):
                    padded = min(deepest, cells - k)
                    for turn in range(rounds):  # high·high, high·low, low·high
                        right = panels + ((turn == 1) * span + k - start) * number * line
                        if packed:
                            right = b + (((turn == 1) * cells + k) * b_column + (b_row + j // width) * padded) * line
                        _rows_block(
                            tile,
                            left,
                            tall,
                            wide,
                            min(depth - k * pairs, padded * pairs),
                            padded,
                            a + (i * a_row + k * pairs * a_column) * item,
                            a_row,
                            a_column,
                            flags & PADDED,
                            turn == 2,
                            right,
                            values,
                            values_row,
                            add or k or turn,
                            edge,
                        )
                if flags & ~PADDED and start + span == cells:
                    other = (i * other_row + j) * c_item
                    finish(
                        finishing,
                        scratch.ctypes.data - TABLE * 8,
                        i,
                        tall,
                        wide,
                        values,
                        values_row,
                        out,
                        c_row,
                        flags,
                        bias + (j * size if flags & BIAS_COLUMN else 0),
                        pre + other,
                        extra + other,
                        other_row,
                    )
    release_tiles(tile)


@routine
def product(
    entry,
    finishing,
    room,
    rows,
    columns,
    depth,
    a,
    a_row,
    a_column,
    b,
    b_row,
    b_column,
    packed,
    c,
    c_row,
    add,
    flags,
    bias,
    pre,
    extra,
    other_row,
):
    """c = epilogue(a · b [+ c where `add`]): a (rows, depth), b (depth, columns), c (rows, columns).

    entry: `product_entry` of the tile; finishing: `finish_entry` of the types, where there are flags; room: the address of `scratch_bytes`
    bytes, 64-byte aligned, for this thread alone. packed: whether b is the address of what `pack` made of a whole matrix; then b_column is
    how many panels that has, and b_row with which of them this b begins. pre and extra share the row stride `other_row` and are of c's
    type. Without CONVERT, c is of the accumulator's type.
    """
    table = view(0, room)
    table[0], table[1], table[2], table[3] = 1, room + 2 * TABLE * 8, 0, finishing
    table[4], table[5], table[6] = rows, columns, depth
    table[7], table[8], table[9] = a, a_row, a_column
    table[10], table[11], table[12], table[13] = b, b_row, b_column, packed
    table[14], table[15], table[16], table[17] = c, c_row, add, flags
    table[18], table[19], table[20], table[21] = bias, pre, extra, other_row
    call_entry(entry, 0, room)


@routine
def plain_product(entry, finishing, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, c, c_row, flags):
    """c = a · b; flags: CONVERT or PADDED, both or neither."""
    product(entry, finishing, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, 0, c, c_row, 0, flags, 0, 0, 0, 0)


# --------------------------------------------------------------------------------------------------------------- for the host side
@cache
def product_entry(tile: Tile) -> int:
    """The address of the compiled product, which kernels are handed: so it is compiled once, not into each of them."""
    return _product.prepare(1, (tile, np.empty(0, np.uint8), *[0] * 19))[0]


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
