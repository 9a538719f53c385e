"""Operands of a product as its innermost loop reads them: panels of B, `width` columns side by side, and tiles of A.

All is in cells, one number or a pair of bfloat16 along the inner dimension. Numbers are moved as they are, or become bfloat16 on their way,
or the lower half of a split float32 (`low`). Vectors of them move where a tile's width is whole; the rest goes one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .bfloat16 import round_to_bfloat16, widen
from .compile import routine
from .kernel import preparation
from .llvm import F32, I16, I32, I64, Code
from .operands import Matrix
from .tiles import Tile, cell_bytes, is_raw, packed_zero, row_bytes, tile_lanes, tile_pairs, tile_rows, tile_step, tile_width
from .views import item_bytes, view, zero_of

KDEPTH = 256  # cells of a slice of the inner dimension, at most


# ----------------------------------------------------------------------------------------------------------------- moving cells
def _packed(b: ir.IRBuilder, number: ir.Value, low: ir.Value) -> ir.Value:
    """The bits of the bfloat16 nearest to a float32, or with `low` != 0 to what that one leaves of it; vectors of them too."""
    bits = round_to_bfloat16(b, number)
    rest = round_to_bfloat16(b, b.fsub(number, widen(b, bits)))
    return b.select(b.icmp_signed("!=", low, ir.Constant(I64, 0)), rest, bits)


@intrinsic
def packed_number(typing_context, zero, x, low):
    """A number as panels hold it: itself, or as `_packed` says."""

    def generate(context, b, signature, values):
        given, wanted = signature.args[1], signature.args[0]
        return values[1] if given == wanted else _packed(b, context.cast(b, values[1], given, types.float32), values[2])

    return zero(zero, x, types.int64), generate


def _numbers(code: Code, tile: Tile, source: Any, address: ir.Value, count: int, low: ir.Value) -> ir.Value:
    """So many numbers as panels hold them, of a Numba type in memory."""
    if tile.pairs == 1:
        return code.load(address, ir.VectorType(ir.IntType(8 * tile.cell_bytes), count))
    if source == types.float32:
        return _packed(code.b, code.load(address, ir.VectorType(F32, count)), low)
    return code.load(address, ir.VectorType(I16, count), 2)


def _mover(count: Any) -> Any:
    """An intrinsic that writes `count(tile)` cells in a row, made of numbers that lie in a row, or for pairs in two."""

    @intrinsic
    def move(typing_context, tile, source_zero, to, first, second, low):
        def generate(context, b, signature, values):
            code, (_, _, to, first, second, low), shape, source = Code(b), values, signature.args[0].tile, signature.args[1]
            number = count(shape)
            one = _numbers(code, shape, source, first, number, low)
            if shape.pairs == 2:
                two = _numbers(code, shape, source, second, number, low)
                order = [j // 2 + number * (j % 2) for j in range(2 * number)]
                one = b.shuffle_vector(one, two, ir.Constant(ir.VectorType(I32, 2 * number), order))
            code.store(one, to)
            return context.get_dummy_value()

        return types.void(tile, source_zero, *[types.int64] * 4), generate

    return move


move_width = _mover(lambda tile: tile.width)
move_rows = _mover(lambda tile: tile.rows)


@intrinsic
def transpose_cells(typing_context, tile, source_zero, to, to_row, source, source_row, low):
    """to[j, i] = source[i, j] over a square of as many 32-bit cells as a vector has; strides in bytes."""

    def generate(context, b, signature, values):
        code, (_, _, to, to_row, source, source_row, low), shape = Code(b), values, signature.args[0].tile
        if shape.cell_bytes != 4:  # never called, but compiled
            return context.get_dummy_value()
        lanes = shape.lane_bytes // 4
        vector = ir.VectorType(I32, lanes)
        places = [code.at(source, b.mul(source_row, code.number(i))) for i in range(lanes)]
        rows = [b.bitcast(_numbers(code, shape, signature.args[1], place, lanes * shape.pairs, low), vector) for place in places]
        size = 1
        while size < lanes:  # swap the off-diagonal halves of ever larger squares
            first = [j if not j & size else lanes + j - size for j in range(lanes)]
            second = [j + size if not j & size else lanes + j for j in range(lanes)]
            for i in range(lanes):
                if not i & size:
                    low_row, high_row = rows[i], rows[i + size]
                    rows[i], rows[i + size] = (
                        b.shuffle_vector(low_row, high_row, ir.Constant(ir.VectorType(I32, lanes), mask)) for mask in (first, second)
                    )
            size *= 2
        for i in range(lanes):
            code.store(rows[i], code.at(to, b.mul(to_row, code.number(i))))
        return context.get_dummy_value()

    return types.void(tile, source_zero, *[types.int64] * 5), generate


# ------------------------------------------------------------------------------------------------------------ panels and tiles
@routine
def _pack_numbers(tile, source_zero, to, cell_step, line_step, source, first, depth, lines, low):
    """The cell k of line j, source[k, j] for k = first ... depth - 1, at k·cell_step + j·line_step cells. Any layout."""
    zero, pairs, numbers = packed_zero(tile), tile_pairs(tile), view(source_zero, source.address)
    out = view(zero, to)
    for j in range(lines):
        for k in range(first, depth):
            number = packed_number(zero, numbers[k * source.row + j * source.column], low)
            out[(k // pairs * cell_step + j * line_step) * pairs + k % pairs] = number


@routine
def _pack_columns(tile, source_zero, panel, source, depth, columns, padded, low):
    """panel[k, j] = source[k, j]: `columns` <= width columns, `depth` numbers deep, zeros beyond both; `padded` cells deep."""
    item, pairs, width, line = item_bytes(source_zero), tile_pairs(tile), tile_width(tile), row_bytes(tile)
    whole, done = depth // pairs, 0  # cells without padding; how many of them are moved by vectors
    if columns < width or pairs * padded > depth:
        blank = view(0, panel)
        for i in range(padded * line // 8):
            blank[i] = 0
    if columns == width and source.column == 1:
        done = whole
        for k in range(whole):
            first = source.address + pairs * k * source.row * item
            move_width(tile, source_zero, panel + k * line, first, first + source.row * item, low)
    elif columns == width and source.row == 1 and cell_bytes(tile) == 4:
        lanes = tile_lanes(tile)
        done = whole // lanes * lanes
        for k in range(0, done, lanes):
            for j in range(0, width, lanes):
                first = source.address + (j * source.column + pairs * k) * item
                transpose_cells(tile, source_zero, panel + k * line + 4 * j, line, first, source.column * item, low)
    _pack_numbers(tile, source_zero, panel, width, 1, source, done * pairs, depth, columns, low)


@routine
def pack_right(tile, source_zero, panels, source, depth, columns, padded, low):
    """Panels of B, `width` columns each, one after the other."""
    width = tile_width(tile)
    for p in range((columns + width - 1) // width):
        panel = panels + p * padded * row_bytes(tile)
        begin = Matrix(source.address + p * width * source.column * item_bytes(source_zero), source.row, source.column)
        _pack_columns(tile, source_zero, panel, begin, depth, min(width, columns - p * width), padded, low)


@routine
def by_rows(tile, a_column):
    """Whether `pack_left` lays A's rows one after the other, packed[t, r, k], rather than its columns, packed[t, k, r]."""
    return a_column == 1 or tile_step(tile) > 1


@routine
def pack_left(tile, source_zero, packed, source, rows, depth, padded, low):
    """Tiles of A by cells, each contiguous; where a tile has steps, its rows are turned through a panel, which is as wide as it is tall."""
    item, pairs, tall, cell, line = item_bytes(source_zero), tile_pairs(tile), tile_rows(tile), cell_bytes(tile), row_bytes(tile)
    zero, whole, tiles = packed_zero(tile), depth // pairs, (rows + tall - 1) // tall
    row, column = source.row, source.column
    panel = packed + tiles * padded * tall * cell
    for t in range(tiles):
        valid, done = min(tall, rows - t * tall), 0
        start, block = source.address + t * tall * row * item, packed + t * padded * tall * cell
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
            _pack_columns(tile, source_zero, panel, Matrix(start, column, row), depth, valid, padded, low)
            for k in range(0, padded, tile_lanes(tile)):
                for r in range(0, tall, tile_lanes(tile)):
                    transpose_cells(tile, zero, block + 4 * (r * padded + k), 4 * padded, panel + k * line + 4 * r, line, 0)
        else:
            if row == 1 and valid == tall:
                done = whole
                for k in range(whole):
                    first = start + pairs * k * column * item
                    move_rows(tile, source_zero, block + k * tall * cell, first, first + column * item, low)
            _pack_numbers(tile, source_zero, block, tall, 1, Matrix(start, column, row), done * pairs, depth, valid, low)


@routine
def slice_cells(tile, cells):
    """Cells of every slice of the inner dimension but the last."""
    step = tile_step(tile)
    slices = max(1, (cells + KDEPTH - 1) // KDEPTH)
    return ((cells + slices - 1) // slices + step - 1) // step * step


@routine
def cells_of(tile, depth):
    unit = tile_pairs(tile) * tile_step(tile)
    return (depth + unit - 1) // unit * tile_step(tile)


@preparation
def pack(band, bands, tile, panels, source, row, column, depth, columns):
    """panels (`panel_bytes`) = B (depth, columns), elements of `source` in steps of row and column, for products with this tile."""
    zero, width, pairs = zero_of(source), tile_width(tile), tile_pairs(tile)
    number, cells = (columns + width - 1) // width, cells_of(tile, depth)
    deepest = slice_cells(tile, cells)
    slices = (cells + deepest - 1) // deepest
    pieces = number * slices * (1 if is_raw(tile) else 2)
    for i in range(pieces * band // bands, pieces * (band + 1) // bands):
        part, k, p = i // (number * slices), i // number % slices * deepest, i % number
        padded = min(deepest, cells - k)
        at = panels.ctypes.data + ((part * cells + k) * number + p * padded) * row_bytes(tile)
        start = source.ctypes.data + (k * pairs * row + p * width * column) * item_bytes(zero)
        deep, wide = min(depth - k * pairs, padded * pairs), min(width, columns - p * width)
        _pack_columns(tile, zero, at, Matrix(start, row, column), deep, wide, padded, part)


def sizes(tile: Tile, columns: int, depth: int) -> tuple[int, int, int]:
    """(cells of the depth, cells of a slice, panels) as the kernels find them."""
    unit = tile.pairs * tile.step
    cells = -(-depth // unit) * tile.step
    deepest = -(-cells // max(1, -(-cells // KDEPTH)))
    return cells, -(-deepest // tile.step) * tile.step, -(-columns // tile.width)


def panel_bytes(tile: Tile, columns: int, depth: int) -> int:
    """What `pack` makes of a matrix (depth, columns)."""
    cells, _, panels = sizes(tile, columns, depth)
    return cells * panels * tile.row_bytes * (2 if tile.split else 1)
