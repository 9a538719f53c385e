"""Intel's tile instructions in software, so that everything around them runs on any CPU: `TILE_INSTRUCTIONS["amx simulated"]`.

A tile register is a kilobyte of the process's memory, sixteen rows of 64 bytes; so one thread at a time.
"""
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from minivit.kernels.cpu.bfloat16 import widen
from minivit.kernels.cpu.tiles import F32, I8, I16, TILE_INSTRUCTIONS

ROW, ROWS = 64, 16                                      # bytes; rows of a register


class Simulated:
    def _register(self, code, tile: int) -> ir.Value:
        """The address of a register's first row."""
        name = f"amx.simulated.{tile}"
        place = code.b.module.globals.get(name)
        if place is None:
            place = cgutils.add_global_variable(code.b.module, ir.ArrayType(I8, ROW * ROWS), name)
            place.initializer = ir.Constant(place.type.pointee, None)
            place.linkage = "internal"
        return code.b.ptrtoint(place, ir.IntType(64))

    def configure(self, code) -> None:
        """Every register holds NaN, so that one that is read before it is set shows."""
        for tile in range(8):
            for row in range(ROWS):
                code.store(ir.Constant(ir.VectorType(F32, 16), [float("nan")] * 16), code.at(self._register(code, tile), ROW * row), 1)

    def release(self, code) -> None:
        self.configure(code)

    def zero(self, code, tile: int) -> None:
        for row in range(ROWS):
            code.store(ir.Constant(ir.VectorType(F32, 16), [0.0] * 16), code.at(self._register(code, tile), ROW * row), 1)

    def _copy(self, code, to, to_row, source, source_row) -> None:
        with cgutils.for_range(code.b, code.number(ROWS)) as loop:
            line = code.load(code.at(source, code.b.mul(loop.index, source_row)), ir.VectorType(I8, ROW), 1)
            code.store(line, code.at(to, code.b.mul(loop.index, to_row)), 1)

    def load(self, code, tile: int, address, stride) -> None:
        self._copy(code, self._register(code, tile), code.number(ROW), address, stride)

    def store(self, code, tile: int, address, stride) -> None:
        self._copy(code, address, stride, self._register(code, tile), code.number(ROW))

    def multiply(self, code, total: int, left: int, right: int) -> None:
        """total[m, n] += Σ_k left[m, 2k]·right[k, 2n] + left[m, 2k+1]·right[k, 2n+1], as TDPBF16PS does."""
        b, (c, x, y) = code.b, (self._register(code, t) for t in (total, left, right))
        halves = ir.VectorType(I16, 32)
        with cgutils.for_range(b, code.number(ROWS)) as m, cgutils.for_range(b, code.number(ROWS)) as k:
            pair = code.load(code.at(x, b.mul(m.index, code.number(ROW)), b.mul(k.index, code.number(4))), ir.VectorType(I16, 2), 1)
            row = code.load(code.at(y, b.mul(k.index, code.number(ROW))), halves, 1)
            place = code.at(c, b.mul(m.index, code.number(ROW)))
            value = code.load(place, ir.VectorType(F32, 16), 1)
            for odd in range(2):
                mask = ir.Constant(ir.VectorType(ir.IntType(32), 16), list(range(odd, 32, 2)))
                numbers = widen(b, b.shuffle_vector(row, row, mask))
                factor = code.splat(widen(b, b.extract_element(pair, ir.Constant(ir.IntType(32), odd))), 16)
                value = b.fadd(value, b.fmul(numbers, factor))
            code.store(value, place, 1)


TILE_INSTRUCTIONS["amx simulated"] = Simulated()
