"""The innermost part of a product: a tile of C that stays in registers, for each precision and kind of CPU.

C[0:rows, 0:width] (+)= A[0:rows, 0:depth] · panel, where a `cell` is what a lane multiplies at once: a number, or two bfloat16 that are
neighbours along the inner dimension and lie together in 32 bits. So one loop serves all: load a row of the panel, and for each row of A
broadcast a cell and multiply-add. How two cells are multiplied is the only difference:

    float32, float64     an fma
    bfloat16  dpbf16ps   AVX512-BF16's instruction, which adds both products of a pair to a float32
              widened    both halves become float32 by a shift and a mask, then two fma: any CPU
              amx        sixteen cells at once, in Intel's tile registers: 2 × 2 of them hold 32 × 32 elements of C
    bf16x3               a float32 is the sum of two bfloat16, high + low; of the product of two sums three terms are kept

A `Tile` is handed to kernels like a number; its type tells the compiler all of it.
"""
from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from .bfloat16 import BFLOAT, narrow, widen

I8, I16, I32, I64, F32, F64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
AMX_CELLS = 16                                          # of the inner dimension, in one tile instruction
MBLOCK = 128                                            # rows of a block of C, at most


@dataclass(frozen=True)
class Tile:
    """rows, and vectors of lane_bytes in a row, of a tile of C, for products in `precision`; `multiply` as above."""

    precision: str                                      # "float32", "float64", "bfloat16" or "bf16x3"
    rows: int
    lane_bytes: int
    vectors: int
    multiply: str = "fma"                               # "fma", "dpbf16ps", "widened", or the name of tile instructions

    @property
    def split(self) -> bool:                            # whether operands lie in memory as float32 and are split when they are packed
        return self.precision == "bf16x3"

    @property
    def pairs(self) -> int:                             # numbers in a cell
        return 1 if self.precision.startswith("float") else 2

    @property
    def cell_bytes(self) -> int:
        return 8 if self.precision == "float64" else 4

    @property
    def row_bytes(self) -> int:                         # of a row of a panel
        return self.vectors * self.lane_bytes

    @property
    def width(self) -> int:                             # columns of a panel
        return self.row_bytes // self.cell_bytes

    @property
    def step(self) -> int:                              # cells that the depth must be a multiple of
        return 1 if self.multiply in ("fma", "dpbf16ps", "widened") else AMX_CELLS

    @property
    def storage(self) -> np.dtype:                      # of A and B in memory, bfloat16 as its bits
        return np.dtype({"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "bf16x3": np.float32}[self.precision])

    @property
    def accumulator(self) -> np.dtype:
        return np.dtype(np.float64 if self.precision == "float64" else np.float32)


# ------------------------------------------------------------------------------------------------------------------- this CPU's
def supported() -> dict[str, bool]:
    """Ways to compute, and whether this CPU has the instructions; the others are there too, slower, but for dpbf16ps and amx."""
    features = llvm.get_host_cpu_features()
    return {"amx": bool(features.get("amx-bf16")) and _amx_permitted(), "avx512bf16": bool(features.get("avx512bf16")),
            "avx512": bool(features.get("avx512f")), "avx2": bool(features.get("avx2")) and bool(features.get("fma"))}


@cache
def _amx_permitted() -> bool:
    """Ask Linux for the tile registers, which a process may use only after it has asked."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def tile_for(precision: str, way: str) -> Tile:
    """The tile of a precision in one way: "amx", "avx512bf16", "avx512", "avx2" or "" (128-bit vectors)."""
    rows, lane_bytes = {"avx2": (6, 32), "": (6, 16)}.get(way, (12, 64))
    if precision in ("float32", "float64"):
        return Tile(precision, rows, lane_bytes, 2)
    if way == "amx":
        return Tile(precision, 32, 64, 2, "amx")
    return Tile(precision, rows, lane_bytes, 2, "dpbf16ps" if way == "avx512bf16" else "widened")


@cache
def host_tile(precision: str) -> Tile:
    """The fastest tile of a precision that this CPU has."""
    return tile_for(precision, next((way for way, there in supported().items() if there), ""))


# --------------------------------------------------------------------------------------------------------- tiles inside kernels
class TileType(types.Type):
    """The Numba type of one tile, which has no other value."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        super().__init__(name=repr(tile))


@register_model(TileType)
class _TileModel(models.OpaqueModel):
    pass


def _of_tile(find: Any) -> Any:
    """An intrinsic that gives an int64 constant found from the tile."""
    @intrinsic
    def value(typing_context, tile):
        return types.int64(tile), lambda context, b, signature, values: ir.Constant(I64, find(signature.args[0].tile))

    return value


tile_rows = _of_tile(lambda tile: tile.rows)
tile_width = _of_tile(lambda tile: tile.width)
tile_pairs = _of_tile(lambda tile: tile.pairs)
tile_step = _of_tile(lambda tile: tile.step)
block_rows = _of_tile(lambda tile: MBLOCK // tile.rows * tile.rows)
tile_lanes = _of_tile(lambda tile: tile.lane_bytes // 4)
narrow_width = _of_tile(lambda tile: tile.width // tile.vectors if tile.step == 1 else 0)       # columns of `multiply_narrow_tile`
is_raw = _of_tile(lambda tile: int(not tile.split))     # whether operands lie in memory as panels hold them
row_bytes = _of_tile(lambda tile: tile.row_bytes)
cell_bytes = _of_tile(lambda tile: tile.cell_bytes)


def _zero_of_tile(find: Any) -> Any:
    """An intrinsic that gives a zero of the type that `find` says."""
    @intrinsic
    def zero(typing_context, tile):
        type_ = getattr(types, find(tile.tile))
        return type_(tile), lambda context, b, signature, values: context.get_constant(signature.return_type, 0)

    return zero


storage_zero = _zero_of_tile(lambda tile: tile.storage.name)
packed_zero = _zero_of_tile(lambda tile: tile.storage.name if tile.pairs == 1 else "uint16")
sum_zero = _zero_of_tile(lambda tile: tile.accumulator.name)


def _packed(b: ir.IRBuilder, number: ir.Value, low: ir.Value) -> ir.Value:
    """The bits of the bfloat16 nearest to a float32, or with `low` != 0 to what that one leaves of it; vectors of them too."""
    bits = narrow(b, number)
    rest = narrow(b, b.fsub(number, widen(b, bits)))
    return b.select(b.icmp_signed("!=", low, ir.Constant(I64, 0)), rest, bits)


@intrinsic
def packed_number(typing_context, zero, x, low):
    """A number as panels hold it: itself, or as `_packed` says."""
    def generate(context, b, signature, values):
        given, wanted = signature.args[1], signature.args[0]
        return values[1] if given == wanted else _packed(b, context.cast(b, values[1], given, types.float32), values[2])

    return zero(zero, x, types.int64), generate


class _Code:
    """LLVM's builder, with addresses as int64."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def at(self, base: ir.Value, *offsets: Any) -> ir.Value:
        for offset in offsets:
            base = self.b.add(base, self.number(offset) if isinstance(offset, int) else offset)
        return base

    def load(self, address: ir.Value, type_: ir.Type, align: int = 4) -> ir.Value:
        return self.b.load(self.b.inttoptr(address, type_.as_pointer()), align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int = 4) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(function, arguments)

    def splat(self, scalar: ir.Value, lanes: int) -> ir.Value:
        vector = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))

    def loop(self, count: ir.Value, starts: list[ir.Value]) -> Any:
        """Begin a loop of `count` >= 1 turns over values that it carries; gives (index, values, end(new values) -> last values)."""
        before = self.b.block
        body, after = self.b.append_basic_block("tile.loop"), self.b.append_basic_block("tile.after")
        self.b.branch(body)
        self.b.position_at_end(body)
        index, carried = self.b.phi(I64), [self.b.phi(s.type) for s in starts]

        def end(values: list[ir.Value]) -> list[ir.Value]:
            following = self.b.add(index, self.number(1))
            for phi, start, value in zip([index, *carried], [self.number(0), *starts], [following, *values]):
                phi.add_incoming(start, before)
                phi.add_incoming(value, self.b.block)
            self.b.cbranch(self.b.icmp_signed("<", following, count), body, after)
            self.b.position_at_end(after)
            return values

        return index, carried, end


def _multiply_add(code: _Code, tile: Tile, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
    """total + left·right, of vectors of cells."""
    b, lanes = code.b, total.type.count
    fma = f"llvm.fmuladd.v{lanes}f{8 * tile.cell_bytes}"
    if tile.multiply == "fma":
        return code.call(fma, total.type, left, right, total)
    if tile.multiply == "dpbf16ps":
        pairs = ir.VectorType(BFLOAT, 2 * lanes)
        return code.call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, b.bitcast(left, pairs), b.bitcast(right, pairs))
    high = ir.Constant(left.type, [-65536] * lanes)
    sixteen = ir.Constant(left.type, [16] * lanes)
    for half in (lambda v: b.and_(v, high)), (lambda v: b.shl(v, sixteen)):
        total = code.call(fma, total.type, b.bitcast(half(left), total.type), b.bitcast(half(right), total.type), total)
    return total


def _multiplier(generate_registers: Any) -> Any:
    @intrinsic
    def multiply(typing_context, tile, depth, a, a_row, a_step, last, panel, c, c_row, add):
        """c[0:rows, 0:width] (+)= a · panel over `depth` cells; rows of a beyond `last` repeat it. Addresses and strides are in bytes."""
        def generate(context, builder, signature, values):
            shape = signature.args[0].tile
            (generate_registers if shape.step == 1 else _generate_amx)(_Code(builder), shape, *values[1:])
            return context.get_dummy_value()

        return types.void(tile, *[types.int64] * 9), generate

    return multiply


def _generate_registers(code: _Code, tile: Tile, depth, a, a_row, a_step, last, panel, c, c_row, add, vectors: int | None = None) -> None:
    vectors = vectors or tile.vectors
    b, lanes = code.b, tile.lane_bytes // tile.cell_bytes
    number = F64 if tile.precision == "float64" else F32
    cell = I32 if tile.pairs == 2 else number
    vector, cells = ir.VectorType(number, lanes), ir.VectorType(cell, lanes)
    rows = [code.at(a, b.mul(b.select(b.icmp_signed("<", code.number(i), last), code.number(i), last), a_row)) for i in range(tile.rows)]
    zero = ir.Constant(vector, [0.0] * lanes)
    _, (offset, line, *sums), end = code.loop(depth, [code.number(0), panel, *[zero] * tile.rows * vectors])
    right = [code.load(code.at(line, v * tile.lane_bytes), cells, tile.cell_bytes) for v in range(vectors)]
    new = []
    for i in range(tile.rows):
        left = code.splat(code.load(code.at(rows[i], offset), cell, min(tile.cell_bytes, 4) if tile.pairs == 1 else 2), lanes)
        new += [_multiply_add(code, tile, left, right[v], sums[i * vectors + v]) for v in range(vectors)]
    _, _, *new = end([b.add(offset, a_step), code.at(line, tile.row_bytes), *new])

    def store(accumulate: bool) -> None:
        for i in range(tile.rows):
            for v in range(vectors):
                place = code.at(c, b.mul(c_row, code.number(i)), v * tile.lane_bytes)
                value = new[i * vectors + v]
                code.store(b.fadd(value, code.load(place, vector)) if accumulate else value, place)

    with b.if_else(b.icmp_signed("!=", add, code.number(0))) as (then, otherwise):
        with then:
            store(True)
        with otherwise:
            store(False)


multiply_tile = _multiplier(_generate_registers)
multiply_narrow_tile = _multiplier(partial(_generate_registers, vectors=1))     # of the first vector's columns alone


# --------------------------------------------------------------------------------------------------------------------------- AMX
class Amx:
    """The instructions on tile registers 0 ... 7, each of 16 rows of 64 bytes."""

    def configure(self, code: _Code) -> None:
        content = bytearray(64)
        content[0] = 1                                  # the palette
        content[16:32:2] = bytes([64] * 8)              # bytes in a row
        content[48:56] = bytes([16] * 8)                # rows
        place = cgutils.global_constant(code.b.module, "amx.configuration", ir.Constant(ir.ArrayType(I8, 64), content))
        code.call("llvm.x86.ldtilecfg", ir.VoidType(), code.b.bitcast(place, I8.as_pointer()))

    def release(self, code: _Code) -> None:
        code.call("llvm.x86.tilerelease", ir.VoidType())

    def zero(self, code: _Code, tile: int) -> None:
        code.call("llvm.x86.tilezero", ir.VoidType(), ir.Constant(I8, tile))

    def load(self, code: _Code, tile: int, address: ir.Value, stride: ir.Value) -> None:
        code.call("llvm.x86.tileloadd64", ir.VoidType(), ir.Constant(I8, tile), code.b.inttoptr(address, I8.as_pointer()), stride)

    def store(self, code: _Code, tile: int, address: ir.Value, stride: ir.Value) -> None:
        code.call("llvm.x86.tilestored64", ir.VoidType(), ir.Constant(I8, tile), code.b.inttoptr(address, I8.as_pointer()), stride)

    def multiply(self, code: _Code, total: int, left: int, right: int) -> None:
        code.call("llvm.x86.tdpbf16ps", ir.VoidType(), *(ir.Constant(I8, t) for t in (total, left, right)))


TILE_INSTRUCTIONS: dict[str, Any] = {"amx": Amx()}      # tests add a simulation


def _generate_amx(code: _Code, tile: Tile, depth, a, a_row, a_step, last, panel, c, c_row, add) -> None:
    """Tiles 0 to 3 hold C, 4 and 5 sixteen rows of A each, 6 and 7 sixteen columns of the panel each."""
    b, amx, half = code.b, TILE_INSTRUCTIONS[tile.multiply], tile.lane_bytes
    parts = [(2 * i + j, code.at(c, b.mul(c_row, code.number(16 * i)), half * j)) for i in range(2) for j in range(2)]
    with b.if_else(b.icmp_signed("!=", add, code.number(0))) as (then, otherwise):
        with then:
            for number, place in parts:
                amx.load(code, number, place, c_row)
        with otherwise:
            for number, _ in parts:
                amx.zero(code, number)
    lower = code.at(a, b.mul(a_row, code.number(16)))
    _, (offset, line), end = code.loop(b.sdiv(depth, code.number(AMX_CELLS)), [code.number(0), panel])
    amx.load(code, 4, code.at(a, offset), a_row)
    amx.load(code, 6, line, code.number(tile.row_bytes))
    amx.load(code, 5, code.at(lower, offset), a_row)
    amx.load(code, 7, code.at(line, half), code.number(tile.row_bytes))
    for number in range(4):
        amx.multiply(code, number, 4 + number // 2, 6 + number % 2)
    end([code.at(offset, 64), code.at(line, AMX_CELLS * tile.row_bytes)])
    for number, place in parts:
        amx.store(code, number, place, c_row)


def _of_instructions(name: str) -> Any:
    @intrinsic
    def run(typing_context, tile):
        def generate(context, builder, signature, values):
            shape = signature.args[0].tile
            if shape.step > 1:
                getattr(TILE_INSTRUCTIONS[shape.multiply], name)(_Code(builder))
            return context.get_dummy_value()

        return types.void(tile), generate

    return run


configure_tiles = _of_instructions("configure")         # before the first `multiply_tile` on a thread, where the tile needs it
release_tiles = _of_instructions("release")             # after the last


# ----------------------------------------------------------------------------------------------------------------- moving cells
def _numbers(code: _Code, tile: Tile, source: Any, address: ir.Value, count: int, low: ir.Value) -> ir.Value:
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
            code, (_, _, to, first, second, low), shape, source = _Code(b), values, signature.args[0].tile, signature.args[1]
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
        code, (_, _, to, to_row, source, source_row, low), shape = _Code(b), values, signature.args[0].tile
        if shape.cell_bytes != 4:                       # never called, but compiled
            return context.get_dummy_value()
        lanes = shape.lane_bytes // 4
        vector = ir.VectorType(I32, lanes)
        rows = [b.bitcast(_numbers(code, shape, signature.args[1], code.at(source, b.mul(source_row, code.number(i))), lanes * shape.pairs, low),
                          vector) for i in range(lanes)]
        size = 1
        while size < lanes:                             # swap the off-diagonal halves of ever larger squares
            first = [j if not j & size else lanes + j - size for j in range(lanes)]
            second = [j + size if not j & size else lanes + j for j in range(lanes)]
            for i in range(lanes):
                if not i & size:
                    low_row, high_row = rows[i], rows[i + size]
                    rows[i], rows[i + size] = (b.shuffle_vector(low_row, high_row, ir.Constant(ir.VectorType(I32, lanes), mask))
                                               for mask in (first, second))
            size *= 2
        for i in range(lanes):
            code.store(rows[i], code.at(to, b.mul(to_row, code.number(i))))
        return context.get_dummy_value()

    return types.void(tile, source_zero, *[types.int64] * 5), generate
