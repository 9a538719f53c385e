"""The microkernel of the matrix product, on one register tile: `cpu/tiles.py` defines what it computes."""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bfloat16 import BFLOAT
from .llvm import F32, F64, I8, I16, I32, X86, Code
from .tiles import AMX_CELLS, Tile

LINE = 64  # bytes of a cache line
UNROLLED = 4  # cells of each row of A in a turn of the loop
PAIR_SUMS = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}  # by the number of lanes
BYTE_SUMS = {8: "llvm.x86.avx512.vpdpbusd.256", 16: "llvm.x86.avx512.vpdpbusd.512"}  # AVX-VNNI has the first under this name too


def _multiply_add(code: Code, tile: Tile, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
    """total + left·right, for vectors of cells."""
    b, lanes = code.b, total.type.count
    fma = f"llvm.fmuladd.v{lanes}f{8 * tile.cell_bytes}"
    if tile.multiply == "fma":
        return code.call(fma, total.type, left, right, total)
    if tile.multiply == "integers":
        return b.add(total, _pair_sums(code, left, right))
    if tile.multiply == "vpdpbusd":
        return code.call(BYTE_SUMS[lanes], total.type, total, left, right)
    if tile.multiply == "bytes":
        for left_half, right_half in zip(_halves(b, left, signed=False), _halves(b, right, signed=True)):
            total = b.add(total, _pair_sums(code, left_half, right_half))
        return total
    if tile.multiply == "dpbf16ps":
        pairs = ir.VectorType(BFLOAT, 2 * lanes)
        return code.call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, b.bitcast(left, pairs), b.bitcast(right, pairs))
    high = ir.Constant(left.type, [-65536] * lanes)
    sixteen = ir.Constant(left.type, [16] * lanes)
    for half in (lambda v: b.and_(v, high)), (lambda v: b.shl(v, sixteen)):
        total = code.call(fma, total.type, b.bitcast(half(left), total.type), b.bitcast(half(right), total.type), total)
    return total


def _pair_sums(code: Code, left: ir.Value, right: ir.Value) -> ir.Value:
    """For vectors of cells of two 16-bit integers: the sum of both products, in 32 bits."""
    b, lanes = code.b, left.type.count
    if X86:
        halves = ir.VectorType(I16, 2 * lanes)
        return code.call(PAIR_SUMS[lanes], left.type, b.bitcast(left, halves), b.bitcast(right, halves))
    sixteen = ir.Constant(left.type, [16] * lanes)
    low, high = (lambda v: b.ashr(b.shl(v, sixteen), sixteen)), (lambda v: b.ashr(v, sixteen))
    return b.add(b.mul(low(left), low(right)), b.mul(high(left), high(right)))


def _halves(b: ir.IRBuilder, cells: ir.Value, signed: bool) -> list[ir.Value]:
    """The even and the odd bytes of cells, as cells of two 16-bit integers."""
    integers = ir.VectorType(I16, 2 * cells.type.count)
    both, eight = b.bitcast(cells, integers), ir.Constant(integers, [8] * integers.count)
    shift = b.ashr if signed else b.lshr
    return [b.bitcast(shift(each, eight), cells.type) for each in (b.shl(both, eight), both)]


def _multiplier(generate_registers: Any) -> Any:
    @intrinsic
    def multiply(typing_context, tile, depth, a, a_row, a_step, last, panel, c, c_row, add):
        """c[0:rows, 0:width] (+)= a · panel over `depth` cells; rows beyond `last` repeat row `last` of a. Strides are in bytes."""

        def generate(context, builder, signature, values):
            shape = signature.args[0].tile
            (generate_registers if shape.step == 1 else _generate_amx)(Code(builder), shape, *values[1:])
            return context.get_dummy_value()

        return types.void(tile, *[types.int64] * 9), generate

    return multiply


def _generate_registers(
    code: Code, tile: Tile, depth, a, a_row, a_step, last, panel, c, c_row, add, vectors: int | None = None, half: bool = False
) -> None:
    vectors, height = vectors or tile.vectors, tile.rows // 2 if half else tile.rows
    b, lanes = code.b, tile.lane_bytes // tile.cell_bytes
    scalar = F64 if tile.precision == "float64" else F32
    cell = scalar if tile.per_cell == 1 else I32
    vector, cells, whole = ir.VectorType(scalar, lanes), ir.VectorType(cell, lanes), tile.precision == "int8"
    rows = [code.at(a, b.mul(b.select(b.icmp_signed("<", code.number(i), last), code.number(i), last), a_row)) for i in range(height)]
    zero = ir.Constant(cells, [0] * lanes) if whole else ir.Constant(vector, [0.0] * lanes)
    for i in range(height):  # the tile of C is read and written at the end, and lies far away
        for place in (*range(0, vectors * tile.lane_bytes, LINE), vectors * tile.lane_bytes - 1):
            code.prefetch(code.at(c, b.mul(c_row, code.number(i)), place))
    lead = [code.load(code.at(panel, v * tile.lane_bytes), cells) if tile.lead else zero for v in range(vectors)]
    first = code.at(panel, tile.lead * tile.row_bytes)
    carried = [code.variable(value) for value in (code.number(0), first, *lead * height)]

    def step(a_step: ir.Value, count: int) -> None:
        """Multiply and add `count` cells of each row of A, `a_step` bytes apart."""
        offset, panel_row, *sums = (b.load(place) for place in carried)
        for k in range(count):
            places = [code.at(panel_row, k * tile.row_bytes + v * tile.lane_bytes) for v in range(vectors)]
            right = [code.load(place, cells, tile.cell_bytes) for place in places]
            for i in range(height):
                address = code.at(rows[i], offset, b.mul(a_step, code.number(k)))
                left = code.splat(code.load(address, cell, min(tile.cell_bytes, 4) if tile.per_cell == 1 else 2), lanes)
                for at in range(i * vectors, (i + 1) * vectors):
                    sums[at] = _multiply_add(code, tile, left, right[at % vectors], sums[at])
        for place, value in zip(
            carried, [code.at(offset, b.mul(a_step, code.number(count))), code.at(panel_row, count * tile.row_bytes), *sums]
        ):
            b.store(value, place)

    rest = depth
    if height * vectors == tile.rows * tile.vectors:
        with b.if_else(b.icmp_signed("==", a_step, code.number(tile.cell_bytes))) as branches:
            for branch, constant in zip(branches, (tile.cell_bytes, tile.rows * tile.cell_bytes)):
                with branch, cgutils.for_range(b, b.sdiv(depth, code.number(UNROLLED))):
                    step(code.number(constant), UNROLLED)  # the multiples of a constant are part of the instructions
        rest = b.srem(depth, code.number(UNROLLED))
    with cgutils.for_range(b, rest):
        step(a_step, 1)
    new = [b.load(place) for place in carried[2:]]

    def store(accumulate: bool) -> None:
        for i in range(height):
            for v in range(vectors):
                address = code.at(c, b.mul(c_row, code.number(i)), v * tile.lane_bytes)
                value = b.sitofp(new[i * vectors + v], vector) if whole else new[i * vectors + v]
                code.store(b.fadd(value, code.load(address, vector)) if accumulate else value, address)

    with b.if_else(b.icmp_signed("!=", add, code.number(0))) as (then, otherwise):
        with then:
            store(True)
        with otherwise:
            store(False)


multiply_tile = _multiplier(_generate_registers)
multiply_one_vector = _multiplier(partial(_generate_registers, vectors=1))  # computes only the columns of the first vector
multiply_half_rows = _multiplier(partial(_generate_registers, half=True))  # computes only the upper half of the rows


# --------------------------------------------------------------------------------------------------------------------------- AMX
class Amx:
    """The instructions on tile registers 0 ... 7, each with 16 rows of 64 bytes."""

    def configure(self, code: Code) -> None:
        content = bytearray(64)
        content[0] = 1  # the palette
        content[16:32:2] = bytes([64] * 8)  # bytes in a row
        content[48:56] = bytes([16] * 8)  # rows
        place = cgutils.global_constant(code.b.module, "amx.configuration", ir.Constant(ir.ArrayType(I8, 64), content))
        code.call("llvm.x86.ldtilecfg", ir.VoidType(), code.b.bitcast(place, I8.as_pointer()))

    def release(self, code: Code) -> None:
        code.call("llvm.x86.tilerelease", ir.VoidType())

    def zero(self, code: Code, tile: int) -> None:
        code.call("llvm.x86.tilezero", ir.VoidType(), ir.Constant(I8, tile))

    def load(self, code: Code, tile: int, address: ir.Value, stride: ir.Value) -> None:
        code.call("llvm.x86.tileloadd64", ir.VoidType(), ir.Constant(I8, tile), code.b.inttoptr(address, I8.as_pointer()), stride)

    def store(self, code: Code, tile: int, address: ir.Value, stride: ir.Value) -> None:
        code.call("llvm.x86.tilestored64", ir.VoidType(), ir.Constant(I8, tile), code.b.inttoptr(address, I8.as_pointer()), stride)

    def multiply(self, code: Code, total: int, left: int, right: int) -> None:
        code.call("llvm.x86.tdpbf16ps", ir.VoidType(), *(ir.Constant(I8, t) for t in (total, left, right)))


TILE_INSTRUCTIONS: dict[str, Any] = {"amx": Amx()}  # tests add a simulator


def _generate_amx(code: Code, tile: Tile, depth, a, a_row, a_step, last, panel, c, c_row, add) -> None:
    """Registers 0 to 3 hold C, 4 and 5 sixteen rows of A each, 6 and 7 sixteen columns of the panel each."""
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
    _, (offset, panel_row), end = code.loop(b.sdiv(depth, code.number(AMX_CELLS)), [code.number(0), panel])
    amx.load(code, 4, code.at(a, offset), a_row)
    amx.load(code, 6, panel_row, code.number(tile.row_bytes))
    amx.load(code, 5, code.at(lower, offset), a_row)
    amx.load(code, 7, code.at(panel_row, half), code.number(tile.row_bytes))
    for number in range(4):
        amx.multiply(code, number, 4 + number // 2, 6 + number % 2)
    end([code.at(offset, 64), code.at(panel_row, AMX_CELLS * tile.row_bytes)])
    for number, place in parts:
        amx.store(code, number, place, c_row)


def _of_instructions(name: str) -> Any:
    @intrinsic
    def run(typing_context, tile):
        def generate(context, builder, signature, values):
            shape = signature.args[0].tile
            if shape.step > 1:
                getattr(TILE_INSTRUCTIONS[shape.multiply], name)(Code(builder))
            return context.get_dummy_value()

        return types.void(tile), generate

    return run


configure_tiles = _of_instructions("configure")  # before the first `multiply_tile` on a thread, if the tile needs it
release_tiles = _of_instructions("release")  # after the last
