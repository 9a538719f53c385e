"""Packing the operands of a product into the layout of the microkernel: panels of B with `width` columns, and tiles of A.

The unit is a cell: one number, or several that are adjacent along the inner dimension. Numbers are copied unchanged, or rounded to
bfloat16, or replaced by the low part of a split float32 (`low`). Full tile widths are moved as vectors, the remainder one number at a time.
Integers of 8 bits are packed by `int8.pack_rounded`.
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
from .llvm import F32, I32, I64, Code
from .operands import Matrix
from .tiles import (
    Tile,
    cell_bytes,
    is_raw,
    lead_rows,
    most_cells,
    packed_zero,
    row_bytes,
    slice_step,
    tile_lanes,
    tile_per_cell,
    tile_rows,
    tile_step,
    tile_width,
)
from .views import item_bytes, view, zero_of


# ----------------------------------------------------------------------------------------------------------------- moving cells
def _packed(b: ir.IRBuilder, number: ir.Value, low: ir.Value) -> ir.Value:
    """The bits of a float32 rounded to bfloat16 or, with `low` != 0, of the rounded remainder. Also for vectors."""
    bits = round_to_bfloat16(b, number)
    rest = round_to_bfloat16(b, b.fsub(number, widen(b, bits)))
    return b.select(b.icmp_signed("!=", low, ir.Constant(I64, 0)), rest, bits)


@intrinsic
def packed_number(typing_context, zero, x, low):
    """A number in its packed form: unchanged, or converted by `_packed`."""

    def generate(context, b, signature, values):
        source, target = signature.args[1], signature.args[0]
        return values[1] if source == target else _packed(b, context.cast(b, values[1], source, types.float32), values[2])

    return zero(zero, x, types.int64), generate


def _numbers(code: Code, tile: Tile, source: Any, address: ir.Value, count: int, low: ir.Value) -> ir.Value:
    """Load `count` numbers of the Numba type `source`, in packed form."""
    item = tile.packed.itemsize
    if source == types.float32 and item < 4:
        return _packed(code.b, code.load(address, ir.VectorType(F32, count)), low)
    return code.load(address, ir.VectorType(ir.IntType(8 * item), count), min(item, 4))


def _interleaved(b: ir.IRBuilder, runs: list[ir.Value]) -> ir.Value:
    """The first numbers of all runs, then the second ones, and so on; the number of runs is a power of two."""
    if len(runs) == 1:
        return runs[0]
    even, odd = _interleaved(b, runs[::2]), _interleaved(b, runs[1::2])
    count = even.type.count
    order = [j // 2 + count * (j % 2) for j in range(2 * count)]
    return b.shuffle_vector(even, odd, ir.Constant(ir.VectorType(I32, 2 * count), order))


def _mover(count: Any) -> Any:
    """An intrinsic that writes `count(tile)` cells from a run of contiguous numbers for each number of a cell, `step` bytes apart."""

    @intrinsic
    def move(typing_context, tile, source_zero, target, first, step, low):
        def generate(context, b, signature, values):
            code, (_, _, target, first, step, low), shape, source = Code(b), values, signature.args[0].tile, signature.args[1]
            places = [code.at(first, b.mul(step, code.number(n))) for n in range(shape.per_cell)]
            code.store(_interleaved(b, [_numbers(code, shape, source, place, count(shape), low) for place in places]), target)
            return context.get_dummy_value()

        return types.void(tile, source_zero, *[types.int64] * 4), generate

    return move


move_width = _mover(lambda tile: tile.width)
move_rows = _mover(lambda tile: tile.rows)


@intrinsic
def transpose_cells(typing_context, tile, source_zero, target, target_row, source, source_row, low):
    """target[j, i] = source[i, j] for a square of 32-bit cells whose side is the length of a vector; strides in bytes."""

    def generate(context, b, signature, values):
        code, (_, _, target, target_row, source, source_row, low), shape = Code(b), values, signature.args[0].tile
        if shape.cell_bytes != 4:  # compiled for all tiles, never called for these
            return context.get_dummy_value()
        lanes = shape.lane_bytes // 4
        vector = ir.VectorType(I32, lanes)
        addresses = [code.at(source, b.mul(source_row, code.number(i))) for i in range(lanes)]
        rows = [b.bitcast(_numbers(code, shape, signature.args[1], address, lanes * shape.per_cell, low), vector) for address in addresses]
        size = 1
        while size < lanes:  # swap the off-diagonal blocks of squares of doubling size
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
            code.store(rows[i], code.at(target, b.mul(target_row, code.number(i))))
        return context.get_dummy_value()

    return types.void(tile, source_zero, *[types.int64] * 5), generate


# ------------------------------------------------------------------------------------------------------------ panels and tiles
@routine
def _pack_numbers(tile, source_zero, target, cell_step, line_step, source, first, depth, lines, low):
    """Write cell k of line j, source[k, j] for k = first ... depth - 1, at offset k·cell_step + j·line_step. Any source layout."""
    zero, per_cell, numbers = packed_zero(tile), tile_per_cell(tile), view(source_zero, source.address)
    out = view(zero, target)
    for j in range(lines):
        for k in range(first, depth):
            number = packed_number(zero, numbers[k * source.row + j * source.column], low)
            out[(k // per_cell * cell_step + j * line_step) * per_cell + k % per_cell] = number


@routine
def _with_numbers_behind(count, step, lines):
    """How many of the lines, `step` numbers apart, have at least `count` more numbers of the matrix behind them: the next line's.

    These are read with a line as one vector, and what is computed of them is not used.
    """
    return max(0, lines - (count + step - 1) // step)


@routine
def _pack_columns(tile, source_zero, panel, source, depth, columns, padded, low):
    """panel[k, j] = source[k, j] for `columns` <= width columns and `depth` numbers, padded to width, and with zeros to `padded` cells."""
    item, per_cell, width, line = item_bytes(source_zero), tile_per_cell(tile), tile_width(tile), row_bytes(tile)
    whole, done = depth // per_cell, 0  # cells without padding; how many of them are moved as vectors
    if source.column == 1:
        done = _with_numbers_behind(width - columns, source.row, depth) // per_cell
        for k in range(done):
            first = source.address + per_cell * k * source.row * item
            move_width(tile, source_zero, panel + k * line, first, source.row * item, low)
    elif columns == width and source.row == 1 and cell_bytes(tile) == 4:
        lanes = tile_lanes(tile)
        done = whole // lanes * lanes
        for k in range(0, done, lanes):
            for j in range(0, width, lanes):
                first = source.address + (j * source.column + per_cell * k) * item
                transpose_cells(tile, source_zero, panel + k * line + 4 * j, line, first, source.column * item, low)
    if columns < width or per_cell * padded > depth:
        words = view(0, panel + done * line)
        for i in range((padded - done) * line // 8):
            words[i] = 0
    _pack_numbers(tile, source_zero, panel, width, 1, source, done * per_cell, depth, columns, low)


@routine
def pack_right(tile, source_zero, panels, source, depth, columns, padded, low):
    """Pack B into consecutive panels of `width` columns."""
    width = tile_width(tile)
    for p in range((columns + width - 1) // width):
        panel = panels + p * padded * row_bytes(tile)
        panel_source = Matrix(source.address + p * width * source.column * item_bytes(source_zero), source.row, source.column)
        _pack_columns(tile, source_zero, panel, panel_source, depth, min(width, columns - p * width), padded, low)


@routine
def by_rows(tile, a_column):
    """Whether `pack_left` stores a tile by rows, packed[t, r, k], or by columns, packed[t, k, r]."""
    return a_column == 1 or tile_step(tile) > 1


@routine
def pack_left(tile, source_zero, packed, source, rows, depth, padded, low):
    """Pack A into contiguous tiles of cells. For tiles with a step > 1 (AMX), a transposed A passes through a panel as wide as a tile."""
    item, per_cell, height, cell, line = item_bytes(source_zero), tile_per_cell(tile), tile_rows(tile), cell_bytes(tile), row_bytes(tile)
    zero, tiles = packed_zero(tile), (rows + height - 1) // height
    row, column = source.row, source.column
    panel = packed + tiles * padded * height * cell
    for t in range(tiles):
        valid, done = min(height, rows - t * height), 0
        start, block = source.address + t * height * row * item, packed + t * padded * height * cell
        if per_cell * padded > depth:
            words = view(np.uint16(0), block)
            for i in range(padded * height * cell // 2):
                words[i] = 0
        if column == 1:
            for r in range(valid):
                target, numbers = view(zero, block + r * padded * cell), view(source_zero, start + r * row * item)
                for k in range(depth):
                    target[k] = packed_number(zero, numbers[k], low)
        elif tile_step(tile) > 1:
            _pack_columns(tile, source_zero, panel, Matrix(start, column, row), depth, valid, padded, low)
            for k in range(0, padded, tile_lanes(tile)):
                for r in range(0, height, tile_lanes(tile)):
                    transpose_cells(tile, zero, block + 4 * (r * padded + k), 4 * padded, panel + k * line + 4 * r, line, 0)
        else:
            if row == 1:
                done = _with_numbers_behind(height - valid, column, depth) // per_cell
                for k in range(done):
                    first = start + per_cell * k * column * item
                    move_rows(tile, source_zero, block + k * height * cell, first, column * item, low)
            _pack_numbers(tile, source_zero, block, height, 1, Matrix(start, column, row), done * per_cell, depth, valid, low)


@routine
def slice_cells(tile, cells):
    """Cells in each slice of the inner dimension except the last."""
    step = slice_step(tile)
    slices = max(1, (cells + most_cells(tile) - 1) // most_cells(tile))
    return ((cells + slices - 1) // slices + step - 1) // step * step


@routine
def cells_of(tile, depth):
    """Cells for `depth` numbers, padded to whole steps."""
    unit = tile_per_cell(tile) * tile_step(tile)
    return (depth + unit - 1) // unit * tile_step(tile)


@routine
def panel_offset(tile, cells, slice_depth, panel_count, part, k, p):
    """Bytes in packed B before panel p of the slice that begins at cell k. part: 1 in the low part of a split B, after the high part."""
    lead, padded = lead_rows(tile), min(slice_depth, cells - k)
    return ((part * cells + k + k // slice_depth * lead) * panel_count + p * (padded + lead)) * row_bytes(tile)


@preparation
def pack(band, bands, tile, panels, source, row, column, depth, columns):
    """panels (`panel_bytes` bytes) = B (depth, columns), packed for this tile; row and column are the strides of `source`."""
    zero, width, per_cell = zero_of(source), tile_width(tile), tile_per_cell(tile)
    panel_count, cells = (columns + width - 1) // width, cells_of(tile, depth)
    slice_depth = slice_cells(tile, cells)
    slices = (cells + slice_depth - 1) // slice_depth
    pieces = panel_count * slices * (1 if is_raw(tile) else 2)
    for i in range(pieces * band // bands, pieces * (band + 1) // bands):
        part, k, p = i // (panel_count * slices), i // panel_count % slices * slice_depth, i % panel_count
        padded = min(slice_depth, cells - k)
        target = panels.ctypes.data + panel_offset(tile, cells, slice_depth, panel_count, part, k, p)
        start = source.ctypes.data + (k * per_cell * row + p * width * column) * item_bytes(zero)
        panel_depth, panel_columns = min(depth - k * per_cell, padded * per_cell), min(width, columns - p * width)
        _pack_columns(tile, zero, target, Matrix(start, row, column), panel_depth, panel_columns, padded, part)


def sizes(tile: Tile, columns: int, depth: int) -> tuple[int, int, int]:
    """(cells of the inner dimension, cells of a slice, panels), as the kernels compute them."""
    unit = tile.per_cell * tile.step
    cells = -(-depth // unit) * tile.step
    slice_depth = -(-cells // max(1, -(-cells // tile.slice_cells)))
    return cells, -(-slice_depth // tile.slice_step) * tile.slice_step, -(-columns // tile.width)


def panel_bytes(tile: Tile, columns: int, depth: int) -> int:
    """Bytes of a packed matrix (depth, columns)."""
    cells, slice_depth, panels = sizes(tile, columns, depth)
    return (cells + -(-cells // slice_depth) * tile.lead) * panels * tile.row_bytes * (2 if tile.split else 1)
