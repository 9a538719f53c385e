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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from . import call, kernel, preparation, routine
from .math import gelu_erf, gelu_tanh
from .tiles import (
    MBLOCK,
    Tile,
    block_rows,
    cell_bytes,
    configure_tiles,
    is_raw,
    move_rows,
    move_width,
    multiply_narrow_tile,
    multiply_tile,
    narrow_width,
    packed_number,
    packed_zero,
    release_tiles,
    row_bytes,
    storage_zero,
    sum_zero,
    tile_lanes,
    tile_pairs,
    tile_rows,
    tile_step,
    tile_width,
    transpose_cells,
)

# Epilogue, in this order; v is the product's element (i, j).
BIAS_COLUMN = 1                                         # v += bias[j]
BIAS_ROW = 2                                            # v += bias[i]
GELU = 4                                                # pre[i, j] = v, then v = gelu(v)
GELU_GRADIENT = 8                                       # v *= gelu'(pre[i, j]), and extra[i, j] = gelu(pre[i, j])
TANH = 16                                               # the tanh form of both
RESIDUAL = 32                                           # v += extra[i, j]
CONVERT = 64                                            # C is not of the accumulator's type

PADDED = 128                                            # no epilogue: rows of A go on with zeros, up to whole cells and steps

KDEPTH, NBLOCK = 256, 768                               # cells of a slice, columns of a block
TABLE = 24                                              # int64 for the arguments of a call; two such tables begin the scratch
I64 = ir.IntType(64)


def item_size(zero: types.Type) -> int:
    return max(1, zero.bitwidth // 8)


@intrinsic
def view(typing_context, zero, address):
    """The elements from an address on, as an array without end; `zero` gives the type of an element."""
    array_type = types.Array(zero, 1, "C")

    def generate(context, b, signature, values):
        item = ir.Constant(I64, item_size(zero))
        endless = ir.Constant(I64, 2**48)
        array = arrayobj.make_array(array_type)(context, b)
        arrayobj.populate_array(array, data=b.inttoptr(values[1], context.get_data_type(zero).as_pointer()), itemsize=item,
                                shape=cgutils.pack_array(b, [endless]), strides=cgutils.pack_array(b, [item]), meminfo=None)
        return array._getvalue()

    return array_type(zero, types.int64), generate


@intrinsic
def item_bytes(typing_context, zero):
    """Bytes of a number of this type."""
    return types.int64(zero), lambda context, b, signature, values: ir.Constant(I64, item_size(zero))


@intrinsic
def zero_of(typing_context, array):
    """A zero of the type of an array's elements."""
    return array.dtype(array), lambda context, b, signature, values: context.get_constant_generic(b, signature.return_type, 0)


# ----------------------------------------------------------------------------------------------------------------------- packing
@routine
def _pack_numbers(tile, source_zero, to, cell_step, line_step, source, row, column, first, depth, lines, low):
    """The cell k of line j, numbers[k·row + j·column] for k = first ... depth - 1, at k·cell_step + j·line_step cells. Any layout."""
    zero, pairs, numbers = packed_zero(tile), tile_pairs(tile), view(source_zero, source)
    out = view(zero, to)
    for j in range(lines):
        for k in range(first, depth):
            out[(k // pairs * cell_step + j * line_step) * pairs + k % pairs] = packed_number(zero, numbers[k * row + j * column], low)


@routine
def _pack_columns(tile, source_zero, panel, source, row, column, depth, columns, padded, low):
    """panel[k, j] = source[k, j]: `columns` <= width columns, `depth` numbers deep, zeros beyond both; `padded` cells deep."""
    item, pairs, width, line = item_bytes(source_zero), tile_pairs(tile), tile_width(tile), row_bytes(tile)
    whole, done = depth // pairs, 0                     # cells without padding; how many of them are moved by vectors
    if columns < width or pairs * padded > depth:
        blank = view(0, panel)
        for i in range(padded * line // 8):
            blank[i] = 0
    if columns == width and column == 1:
        done = whole
        for k in range(whole):
            first = source + pairs * k * row * item
            move_width(tile, source_zero, panel + k * line, first, first + row * item, low)
    elif columns == width and row == 1 and cell_bytes(tile) == 4:
        lanes = tile_lanes(tile)
        done = whole // lanes * lanes
        for k in range(0, done, lanes):
            for j in range(0, width, lanes):
                transpose_cells(tile, source_zero, panel + k * line + 4 * j, line, source + (j * column + pairs * k) * item, column * item,
                                low)
    _pack_numbers(tile, source_zero, panel, width, 1, source, row, column, done * pairs, depth, columns, low)


@routine
def _pack_right(tile, source_zero, panels, source, row, column, depth, columns, padded, low):
    """Panels of B, `width` columns each, one after the other."""
    width = tile_width(tile)
    for p in range((columns + width - 1) // width):
        _pack_columns(tile, source_zero, panels + p * padded * row_bytes(tile), source + p * width * column * item_bytes(source_zero),
                      row, column, depth, min(width, columns - p * width), padded, low)


@routine
def _by_rows(tile, a_column):
    """Whether `_pack_left` lays A's rows one after the other, packed[t, r, k], rather than its columns, packed[t, k, r]."""
    return a_column == 1 or tile_step(tile) > 1


@routine
def _pack_left(tile, source_zero, packed, source, row, column, rows, depth, padded, low):
    """Tiles of A by cells, each contiguous; where a tile has steps, its rows are turned through a panel, which is as wide as it is tall."""
    item, pairs, tall, cell, line = item_bytes(source_zero), tile_pairs(tile), tile_rows(tile), cell_bytes(tile), row_bytes(tile)
    zero, whole, tiles = packed_zero(tile), depth // pairs, (rows + tall - 1) // tall
    panel = packed + tiles * padded * tall * cell
    for t in range(tiles):
        valid, done = min(tall, rows - t * tall), 0
        start, block = source + t * tall * row * item, packed + t * padded * tall * cell
        if pairs * padded > depth:
            blank = view(np.uint16(0), block)
            for i in range(padded * tall * cell // 2):
                blank[i] = 0
        if column == 1:
            for r in range(valid):
                to, numbers = view(zero, block + r * padded * cell), view(source_zero, start + r * row * item)
                for k in range(depth):
                    to[k] = packed_number(zero, numbers[k], low)
        elif tile_step(tile) > 1:
            _pack_columns(tile, source_zero, panel, start, column, row, depth, valid, padded, low)
            for k in range(0, padded, tile_lanes(tile)):
                for r in range(0, tall, tile_lanes(tile)):
                    transpose_cells(tile, zero, block + 4 * (r * padded + k), 4 * padded, panel + k * line + 4 * r, line, 0)
        else:
            if row == 1 and valid == tall:
                done = whole
                for k in range(whole):
                    first = start + pairs * k * column * item
                    move_rows(tile, source_zero, block + k * tall * cell, first, first + column * item, low)
            _pack_numbers(tile, source_zero, block, tall, 1, start, column, row, done * pairs, depth, valid, low)


@routine
def _slice_cells(tile, cells):
    """Cells of every slice of the inner dimension but the last."""
    step = tile_step(tile)
    slices = max(1, (cells + KDEPTH - 1) // KDEPTH)
    return ((cells + slices - 1) // slices + step - 1) // step * step


@routine
def _cells(tile, depth):
    unit = tile_pairs(tile) * tile_step(tile)
    return (depth + unit - 1) // unit * tile_step(tile)


@preparation
def pack(band, bands, tile, panels, source, row, column, depth, columns):
    """panels (`panel_bytes`) = B (depth, columns), elements of `source` in steps of row and column, for products with this tile."""
    zero, width, pairs = zero_of(source), tile_width(tile), tile_pairs(tile)
    number, cells = (columns + width - 1) // width, _cells(tile, depth)
    deepest = _slice_cells(tile, cells)
    slices = (cells + deepest - 1) // deepest
    pieces = number * slices * (1 if is_raw(tile) else 2)
    for i in range(pieces * band // bands, pieces * (band + 1) // bands):
        part, k, p = i // (number * slices), i // number % slices * deepest, i % number
        padded = min(deepest, cells - k)
        at = panels.ctypes.data + ((part * cells + k) * number + p * padded) * row_bytes(tile)
        start = source.ctypes.data + (k * pairs * row + p * width * column) * item_bytes(zero)
        deep, wide = min(depth - k * pairs, padded * pairs), min(width, columns - p * width)
        _pack_columns(tile, zero, at, start, row, column, deep, wide, padded, part)


# ---------------------------------------------------------------------------------------------------------------------- epilogue
@kernel
def _epilogue(band, bands, sums, outs, first, rows, columns, values, values_row, c, c_row, flags, bias, pre, extra, other_row):
    """The epilogue over rows `first` ... of C: from sums at `values` to C at c; `pre` and `extra` are of C's type and at its rows.

    sums, outs: empty arrays of the two types.
    """
    zero, out_zero = zero_of(sums), zero_of(outs)
    item, size = item_bytes(zero), item_bytes(out_zero)
    biases = view(zero, bias)
    for i in range(rows):
        line = view(zero, values + i * values_row * item)
        out = view(out_zero, c + i * c_row * size)
        before = view(out_zero, pre + i * other_row * size)
        others = view(out_zero, extra + i * other_row * size)
        if flags & BIAS_COLUMN:
            for j in range(columns):
                line[j] += biases[j]
        if flags & BIAS_ROW:
            for j in range(columns):
                line[j] += biases[first + i]
        if flags & GELU:
            for j in range(columns):
                before[j] = line[j]
            if flags & TANH:
                for j in range(columns):
                    line[j] = gelu_tanh(line[j])[0]
            else:
                for j in range(columns):
                    line[j] = gelu_erf(line[j])[0]
        if flags & GELU_GRADIENT:
            if flags & TANH:
                for j in range(columns):
                    activated, slope = gelu_tanh(zero + before[j])
                    line[j] *= slope
                    others[j] = activated
            else:
                for j in range(columns):
                    activated, slope = gelu_erf(zero + before[j])
                    line[j] *= slope
                    others[j] = activated
        if flags & RESIDUAL:
            for j in range(columns):
                line[j] += others[j]
        if flags & CONVERT:
            for j in range(columns):
                out[j] = line[j]


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
            whole = valid == tall and wide == width
            if wide <= narrow_width(tile):
                multiply_narrow_tile(tile, depth, a + t * a_tile, a_row, a_step, valid - 1, panel, edge, width * item, 0)
            else:
                multiply_tile(tile, depth, a + t * a_tile, a_row, a_step, valid - 1, panel,
                              out if whole else edge, c_row * item if whole else width * item, add if whole else 0)
            if not whole:
                for r in range(valid):
                    line, spare = view(zero, out + r * c_row * item), view(zero, edge + r * width * item)
                    for j in range(wide):
                        line[j] = spare[j] + (line[j] if add else zero)


@routine
def _rows_block(tile, packed, rows, columns, depth, cells, a, a_row, a_column, padded, low, panels, c, c_row, add, edge):
    """The same for a block of rows of A as it lies in memory: there, where that works, or packed."""
    zero, tall, cell = storage_zero(tile), tile_rows(tile), cell_bytes(tile)
    item, there = item_bytes(zero), 0                   # rows that are read where they lie
    if a_column == 1 and is_raw(tile) and (padded or cells * tile_pairs(tile) == depth):
        there = rows if tile_step(tile) == 1 else rows // tall * tall           # tile instructions would read rows that are not A's
    if there:
        _block(tile, there, columns, cells, a, a_row * item, cell, tall * a_row * item, panels, c, c_row, add, edge)
    if there < rows:
        _pack_left(tile, zero, packed, a + there * a_row * item, a_row, a_column, rows - there, depth, cells, low)
        row, step = (cells * cell, cell) if _by_rows(tile, a_column) else (cell, tall * cell)
        _block(tile, rows - there, columns, cells, packed, row, step, tall * cells * cell, panels,
               c + there * c_row * item_bytes(sum_zero(tile)), c_row, add, edge)


@kernel
def _product(band, bands, tile, scratch, finish, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, packed, c, c_row, add, flags,
             bias, pre, extra, other_row):
    zero, width, pairs, line = storage_zero(tile), tile_width(tile), tile_pairs(tile), row_bytes(tile)
    item, size = item_bytes(zero), item_bytes(sum_zero(tile))
    c_item = 2 if flags & CONVERT else size
    cells = _cells(tile, depth)
    deepest = _slice_cells(tile, cells)
    slices = (cells + deepest - 1) // deepest
    inside = slices if flags & CONVERT else 1           # slices that run inside a block of rows
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
                        _pack_right(tile, zero, panels + (part * span + k - start) * number * line,
                                    b + (k * pairs * b_row + j * b_column) * item, b_row, b_column,
                                    min(depth - k * pairs, padded * pairs), wide, padded, part)
            for i in range(0, rows, block_rows(tile)):
                tall = min(block_rows(tile), rows - i)
                out = c + (i * c_row + j) * c_item
                values, values_row = (block, number * width) if flags & CONVERT else (out, c_row)
                for k in range(start, start + span, deepest):
                    padded = min(deepest, cells - k)
                    for turn in range(rounds):          # high·high, high·low, low·high
                        right = panels + ((turn == 1) * span + k - start) * number * line
                        if packed:
                            right = b + (((turn == 1) * cells + k) * b_column + (b_row + j // width) * padded) * line
                        _rows_block(tile, left, tall, wide, min(depth - k * pairs, padded * pairs), padded,
                                    a + (i * a_row + k * pairs * a_column) * item, a_row, a_column, flags & PADDED, turn == 2, right,
                                    values, values_row, add or k or turn, edge)
                if flags & ~PADDED and start + span == cells:
                    other = (i * other_row + j) * c_item
                    _finish(finish, scratch.ctypes.data - TABLE * 8, i, tall, wide, values, values_row, out, c_row, flags,
                            bias + (j * size if flags & BIAS_COLUMN else 0), pre + other, extra + other, other_row)
    release_tiles(tile)


@routine
def _finish(entry, room, first, rows, columns, values, values_row, c, c_row, flags, bias, pre, extra, other_row):
    table = view(0, room)
    table[0], table[1], table[2], table[3], table[4] = 1, 0, 0, 0, 0
    table[5], table[6], table[7] = first, rows, columns
    table[8], table[9], table[10], table[11] = values, values_row, c, c_row
    table[12], table[13], table[14], table[15], table[16] = flags, bias, pre, extra, other_row
    call(entry, 0, room)


@routine
def product(entry, finish, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, packed, c, c_row, add, flags, bias, pre,
            extra, other_row):
    """c = epilogue(a · b [+ c where `add`]): a (rows, depth), b (depth, columns), c (rows, columns).

    entry: `product_entry` of the tile; finish: `finish_entry` of the types, where there are flags; room: the address of `scratch_bytes`
    bytes, 64-byte aligned, for this thread alone. packed: whether b is the address of what `pack` made of a whole matrix; then b_column is
    how many panels that has, and b_row with which of them this b begins. pre and extra share the row stride `other_row` and are of c's
    type. Without CONVERT, c is of the accumulator's type.
    """
    table = view(0, room)
    table[0], table[1], table[2], table[3] = 1, room + 2 * TABLE * 8, 0, finish
    table[4], table[5], table[6] = rows, columns, depth
    table[7], table[8], table[9] = a, a_row, a_column
    table[10], table[11], table[12], table[13] = b, b_row, b_column, packed
    table[14], table[15], table[16], table[17] = c, c_row, add, flags
    table[18], table[19], table[20], table[21] = bias, pre, extra, other_row
    call(entry, 0, room)


@routine
def plain_product(entry, finish, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, c, c_row, flags):
    """c = a · b; flags: CONVERT or PADDED, both or neither."""
    product(entry, finish, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, 0, c, c_row, 0, flags, 0, 0, 0, 0)


# --------------------------------------------------------------------------------------------------------------- for the host side
@cache
def product_entry(tile: Tile) -> int:
    """The address of the compiled product, which kernels are handed: so it is compiled once, not into each of them."""
    return _product.prepare(1, (tile, np.empty(0, np.uint8), *[0] * 19))[0]


@cache
def finish_entry(accumulator: np.dtype, dtype: np.dtype) -> int:
    """The address of the compiled epilogue from sums of the first type to an output of the second."""
    return _epilogue.prepare(1, (np.empty(0, accumulator), np.empty(0, dtype), *[0] * 12))[0]


def _sizes(tile: Tile, columns: int, depth: int) -> tuple[int, int, int]:
    """(cells of the depth, cells of a slice, panels) as the kernels find them."""
    unit = tile.pairs * tile.step
    cells = -(-depth // unit) * tile.step
    deepest = -(-cells // max(1, -(-cells // KDEPTH)))
    return cells, -(-deepest // tile.step) * tile.step, -(-columns // tile.width)


def scratch_bytes(tile: Tile, rows: int, columns: int, depth: int, packed: bool = False) -> int:
    """Room that `product` needs for its packed blocks, a multiple of 64 bytes."""
    cells, deepest, panels = _sizes(tile, columns, depth)
    panels = min(panels, NBLOCK // tile.width)
    most = cells if tile.pairs == 2 else deepest        # with CONVERT all slices of B are packed at once
    right = 0 if packed else panels * tile.row_bytes * most * (2 if tile.split else 1)
    left = (MBLOCK + 2 * tile.rows) * deepest * tile.cell_bytes
    spare = tile.rows * tile.width * tile.accumulator.itemsize
    block = min(rows, MBLOCK) * panels * tile.width * 4 if tile.pairs == 2 else 0
    return 2 * TABLE * 8 + right + left + spare + block + 63 & ~63


def panel_bytes(tile: Tile, columns: int, depth: int) -> int:
    """What `pack` makes of a matrix (depth, columns)."""
    cells, _, panels = _sizes(tile, columns, depth)
    return cells * panels * tile.row_bytes * (2 if tile.split else 1)

