"""The product of two blocks of matrices on one thread, with an epilogue; what gemm, attention and mixing are made of.

The scheme is that of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008) and BLIS. A register tile of
ROWS × COLUMNS elements of C is the sum of outer products of a column of A with a row of B:

    for a KDEPTH-deep slice of the inner dimension                  B's slice is packed into panels of COLUMNS, each contiguous
        for a block of MBLOCK rows                                  A's block stays in L2
            for a panel of B                                        which stays in L1
                for a tile of ROWS rows: `_tile`
            after the last slice: the epilogue over the block's rows, while they are in L2

A is read where it lies when its rows are contiguous, and packed otherwise. All addresses are int64, all strides count elements.
"""
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from . import call, kernel, routine
from .math import gelu_erf, gelu_tanh

# Epilogue, in this order; v is the product's element (i, j).
BIAS_COLUMN = 1                                         # v += bias[j]
BIAS_ROW = 2                                            # v += bias[i]
GELU = 4                                                # pre[i, j] = v, then v = gelu(v)
GELU_GRADIENT = 8                                       # v *= gelu'(pre[i, j]), and extra[i, j] = gelu(pre[i, j])
TANH = 16                                               # the tanh form of both
RESIDUAL = 32                                           # v += extra[i, j]

KDEPTH, MBLOCK, NBLOCK = 256, 120, 1024
TABLE_BYTES = 192                                       # for the arguments of a call, at the start of the scratch


class Tile(NamedTuple):
    """The register tile: rows, and bytes of a vector times vectors of a row."""

    rows: int
    lane_bytes: int
    vectors: int


def _host_tile() -> Tile:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Tile(8, 64, 2)
    if features.get("avx2"):
        return Tile(6, 32, 2)
    return Tile(6, 16, 2)


TILE = _host_tile()
ROWS = TILE.rows
ROW_BYTES = TILE.lane_bytes * TILE.vectors              # of a row of the tile


def scratch_bytes(rows: int, columns: int, depth: int) -> int:
    """Room that `product` needs for its packed blocks, a multiple of 64 bytes."""
    depth = min(depth, KDEPTH)
    panels = -(-min(columns, NBLOCK) * 8 // ROW_BYTES) * ROW_BYTES * depth
    return TABLE_BYTES + panels + (MBLOCK + ROWS) * depth * 8 + ROWS * ROW_BYTES + 63 & ~63


I64 = ir.IntType(64)


@intrinsic
def _tile(typing_context, zero, depth, a, a_row, a_column, last, panel, c, c_row, add):
    """c[0:ROWS, 0:COLUMNS] (+)= a[0:ROWS, 0:depth] · panel; rows of a beyond `last` repeat it."""
    def generate(context, b, signature, values):
        _, depth, a, a_row, a_column, last, panel, c, c_row, add = values
        number = context.get_value_type(zero)
        item = 4 if zero == types.float32 else 8
        lanes = TILE.lane_bytes // item
        vector = ir.VectorType(number, lanes)
        name = f"llvm.fmuladd.v{lanes}f{item * 8}"
        fma = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(vector, [vector] * 3), name)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)

        def constant(value):
            return ir.Constant(I64, value)

        def address(base, offset, type_):
            return b.inttoptr(b.add(base, offset), type_.as_pointer())

        def load(base, offset, type_, align):
            instruction = b.load(address(base, offset, type_))
            instruction.align = align
            return instruction

        rows = []
        for i in range(ROWS):
            clamped = b.select(b.icmp_signed("<", constant(i), last), constant(i), last)
            rows.append(b.add(a, b.mul(clamped, b.mul(a_row, constant(item)))))
        step = b.mul(a_column, constant(item))

        before = b.block
        loop, after = b.append_basic_block("tile.loop"), b.append_basic_block("tile.after")
        b.branch(loop)
        b.position_at_end(loop)
        k, offset, row = (b.phi(I64) for _ in range(3))
        sums = [[b.phi(vector) for _ in range(TILE.vectors)] for _ in range(ROWS)]
        right = [load(row, constant(v * TILE.lane_bytes), vector, item) for v in range(TILE.vectors)]
        new = []
        for i in range(ROWS):
            scalar = load(rows[i], offset, number, item)
            left = b.shuffle_vector(b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)),
                                    ir.Constant(vector, ir.Undefined), zeros)
            new.append([b.call(fma, [left, right[v], sums[i][v]]) for v in range(TILE.vectors)])
        following = b.add(k, constant(1)), b.add(offset, step), b.add(row, constant(ROW_BYTES))
        for phi, start, value in zip((k, offset, row), (constant(0), constant(0), panel), following):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        for i in range(ROWS):
            for v in range(TILE.vectors):
                sums[i][v].add_incoming(ir.Constant(vector, [0.0] * lanes), before)
                sums[i][v].add_incoming(new[i][v], loop)
        b.cbranch(b.icmp_signed("<", following[0], depth), loop, after)
        b.position_at_end(after)

        def store(accumulate):
            for i in range(ROWS):
                line = b.add(c, b.mul(c_row, constant(i * item)))
                for v in range(TILE.vectors):
                    value = new[i][v]
                    if accumulate:
                        value = b.fadd(value, load(line, constant(v * TILE.lane_bytes), vector, item))
                    b.store(value, address(line, constant(v * TILE.lane_bytes), vector)).align = item

        with b.if_else(b.icmp_signed("!=", add, constant(0))) as (then, otherwise):
            with then:
                store(True)
            with otherwise:
                store(False)
        return context.get_dummy_value()

    i = types.int64
    return types.void(zero, i, i, i, i, i, i, i, i, i), generate


@intrinsic
def view(typing_context, zero, address):
    """The elements from an address on, as an array without end; `zero` gives the type of an element."""
    array_type = types.Array(zero, 1, "C")

    def generate(context, b, signature, values):
        item = ir.Constant(I64, 4 if zero == types.float32 else 8)
        endless = ir.Constant(I64, 2**48)
        array = arrayobj.make_array(array_type)(context, b)
        arrayobj.populate_array(array, data=b.inttoptr(values[1], context.get_data_type(zero).as_pointer()), itemsize=item,
                                shape=cgutils.pack_array(b, [endless]), strides=cgutils.pack_array(b, [item]), meminfo=None)
        return array._getvalue()

    return array_type(zero, types.int64), generate


@intrinsic
def item_bytes(typing_context, zero):
    """Bytes of a number of this type."""
    return types.int64(zero), lambda context, b, signature, values: ir.Constant(I64, 4 if zero == types.float32 else 8)


@routine
def _pack_right(zero, panels, right, row, column, depth, columns):
    """panels[p, k, j] = right[k, p·width + j], padded with zeros: `width` columns are a panel."""
    item = item_bytes(zero)
    width = ROW_BYTES // item
    for p in range((columns + width - 1) // width):
        panel = panels + p * depth * ROW_BYTES
        origin = right + p * width * column * item
        valid = min(width, columns - p * width)
        if valid < width:
            padded = view(zero, panel)
            for i in range(depth * width):
                padded[i] = 0
        if column == 1:
            for k in range(depth):
                to, source = view(zero, panel + k * ROW_BYTES), view(zero, origin + k * row * item)
                for j in range(valid):
                    to[j] = source[j]
        else:
            for j in range(valid):
                to, source = view(zero, panel + j * item), view(zero, origin + j * column * item)
                for k in range(depth):
                    to[k * width] = source[k * row]


@routine
def _pack_left(zero, packed, left, row, column, rows, depth):
    """packed[t, k, r] = left[t·ROWS + r, k]: tiles of ROWS rows, each contiguous by columns."""
    item = item_bytes(zero)
    for t in range((rows + ROWS - 1) // ROWS):
        valid = min(ROWS, rows - t * ROWS)
        for k in range(depth):
            to = view(zero, packed + (t * depth + k) * ROWS * item)
            source = view(zero, left + (t * ROWS * row + k * column) * item)
            for r in range(valid):
                to[r] = source[r * row]


@routine
def _epilogue(zero, first, rows, columns, c, c_row, flags, bias, pre, extra, other_row):
    """The epilogue over rows `first` … of C, whose row `first` is at address c; `pre` and `extra` likewise."""
    item = item_bytes(zero)
    for i in range(rows):
        values = view(zero, c + i * c_row * item)
        before = view(zero, pre + i * other_row * item)
        others = view(zero, extra + i * other_row * item)
        if flags & BIAS_COLUMN:
            for j in range(columns):
                values[j] += bias[j]
        if flags & BIAS_ROW:
            for j in range(columns):
                values[j] += bias[first + i]
        if flags & GELU:
            for j in range(columns):
                before[j] = values[j]
            if flags & TANH:
                for j in range(columns):
                    values[j] = gelu_tanh(values[j])[0]
            else:
                for j in range(columns):
                    values[j] = gelu_erf(values[j])[0]
        if flags & GELU_GRADIENT:
            if flags & TANH:
                for j in range(columns):
                    activated, slope = gelu_tanh(before[j])
                    values[j] *= slope
                    others[j] = activated
            else:
                for j in range(columns):
                    activated, slope = gelu_erf(before[j])
                    values[j] *= slope
                    others[j] = activated
        if flags & RESIDUAL:
            for j in range(columns):
                values[j] += others[j]


@routine
def _block(zero, rows, columns, depth, a, a_row, a_column, a_tile, panels, c, c_row, add, edge):
    """c[0:rows, 0:columns] (+)= a · panels, tile by tile; tiles of a are a_tile apart; `edge` is the address of a spare tile."""
    item = item_bytes(zero)
    width = ROW_BYTES // item
    for p in range((columns + width - 1) // width):
        panel = panels + p * depth * ROW_BYTES
        wide = min(width, columns - p * width)
        for t in range((rows + ROWS - 1) // ROWS):
            tall = min(ROWS, rows - t * ROWS)
            out = c + (t * ROWS * c_row + p * width) * item
            whole = tall == ROWS and wide == width
            _tile(zero, depth, a + t * a_tile * item, a_row, a_column, tall - 1, panel,
                  out if whole else edge, c_row if whole else width, add if whole else 0)
            if not whole:
                for r in range(tall):
                    line, spare = view(zero, out + r * c_row * item), view(zero, edge + r * ROW_BYTES)
                    for j in range(wide):
                        line[j] = spare[j] + (line[j] if add else zero)


@kernel
def _product(band, bands, scratch, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, c, c_row, add, flags, bias, pre, extra,
             other_row):
    zero = scratch.dtype.type(0)
    item = item_bytes(zero)
    width = ROW_BYTES // item                           # columns of a panel
    slices = (depth + KDEPTH - 1) // KDEPTH
    deepest = (depth + slices - 1) // slices
    panels = scratch.ctypes.data
    packed = panels + (min(columns, NBLOCK) + width - 1) // width * ROW_BYTES * deepest
    edge = packed + (MBLOCK + ROWS) * deepest * item
    for j in range(0, columns, NBLOCK):
        wide = min(NBLOCK, columns - j)
        for s in range(slices):
            k = s * depth // slices
            deep = (s + 1) * depth // slices - k
            _pack_right(zero, panels, b + (k * b_row + j * b_column) * item, b_row, b_column, deep, wide)
            for i in range(0, rows, MBLOCK):
                tall = min(MBLOCK, rows - i)
                left = a + (i * a_row + k * a_column) * item
                out = c + (i * c_row + j) * item
                row, column, tile = a_row, a_column, ROWS * a_row
                if a_column != 1:
                    _pack_left(zero, packed, left, a_row, a_column, tall, deep)
                    left, row, column, tile = packed, 1, ROWS, ROWS * deep
                _block(zero, tall, wide, deep, left, row, column, tile, panels, out, c_row, add or s, edge)
                if flags and s == slices - 1:
                    other = (i * other_row + j) * item
                    _epilogue(zero, i, tall, wide, out, c_row, flags, view(zero, bias + (j * item if flags & BIAS_COLUMN else 0)),
                              pre + other, extra + other, other_row)


@cache
def product_entry(dtype: np.dtype) -> int:
    """The address of the compiled product of this type, which kernels are handed: so it is compiled once, not into each of them."""
    return _product.prepare(1, (np.empty(0, dtype), *[0] * 17))[0]


@routine
def product(entry, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, c, c_row, add, flags, bias, pre, extra, other_row):
    """c = epilogue(a · b [+ c where `add`]): a (rows, depth), b (depth, columns), c (rows, columns).

    entry: `product_entry` of the type; room: the address of `scratch_bytes` bytes, 64-byte aligned, for this thread alone; pre and extra
    share the row stride `other_row`.
    """
    table = view(0, room)
    table[0] = 1
    table[1] = room + TABLE_BYTES
    table[2] = 0
    table[3], table[4], table[5] = rows, columns, depth
    table[6], table[7], table[8] = a, a_row, a_column
    table[9], table[10], table[11] = b, b_row, b_column
    table[12], table[13], table[14] = c, c_row, add
    table[15], table[16], table[17], table[18], table[19] = flags, bias, pre, extra, other_row
    call(entry, 0, room)


@routine
def plain_product(entry, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, c, c_row):
    """c = a · b."""
    product(entry, room, rows, columns, depth, a, a_row, a_column, b, b_row, b_column, c, c_row, 0, 0, 0, 0, 0, 0)
