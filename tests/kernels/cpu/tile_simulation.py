"""Intel's tile instructions in software, so that everything around them runs on any CPU: `TILE_INSTRUCTIONS["amx simulated"]`.

A tile register is a kilobyte of the process's memory, sixteen rows of 64 bytes; so one thread at a time.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from minivit.kernels.cpu.bfloat16 import widen
from minivit.kernels.cpu.llvm import F32, I8, I16, I64
from minivit.kernels.cpu.multiply import TILE_INSTRUCTIONS

ROW, ROWS = 64, 16  # bytes; rows of a register
SIZE = ROW * ROWS  # bytes of a register


class Simulated:
    """Each instruction is a function of its own, so that a product is not much more code than with real ones."""

    def _call(self, code, name: str, body, *arguments) -> None:
        """Call the function that `body(code, registers, *arguments)` generates, all arguments int64."""
        module = code.b.module
        arguments = [code.number(a) if isinstance(a, int) else a for a in arguments]
        function = module.globals.get(f"amx.simulated.{name}")
        if function is None:
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * len(arguments)), f"amx.simulated.{name}")
            function.linkage = "internal"
            function.attributes.add("noinline")
            own = type(code)(ir.IRBuilder(function.append_basic_block()))
            body(own, own.b.ptrtoint(self._registers(module), I64), *function.args)
            own.b.ret_void()
        code.b.call(function, arguments)

    def _registers(self, module) -> ir.Value:
        place = module.globals.get("amx.simulated.registers")
        if place is None:
            place = cgutils.add_global_variable(module, ir.ArrayType(I8, 8 * SIZE), "amx.simulated.registers")
            place.initializer = ir.Constant(place.type.pointee, None)
            place.linkage = "internal"
        return place

    def configure(self, code) -> None:
        """Every register holds NaN, so that one that is read before it is set shows."""
        self._call(code, "configure", lambda own, registers: self._fill(own, registers, 8 * SIZE, float("nan")))

    def release(self, code) -> None:
        self.configure(code)

    def zero(self, code, tile: int) -> None:
        self._call(code, "zero", lambda own, registers, number: self._fill(own, self._of(own, registers, number), SIZE, 0.0), tile)

    def load(self, code, tile: int, address, stride) -> None:
        self._call(
            code,
            "load",
            lambda own, registers, number, address, stride: self._copy(
                own, self._of(own, registers, number), own.number(ROW), address, stride
            ),
            tile,
            address,
            stride,
        )

    def store(self, code, tile: int, address, stride) -> None:
        self._call(
            code,
            "store",
            lambda own, registers, number, address, stride: self._copy(
                own, address, stride, self._of(own, registers, number), own.number(ROW)
            ),
            tile,
            address,
            stride,
        )

    def multiply(self, code, total: int, left: int, right: int) -> None:
        """total[m, n] += Σ_k left[m, 2k]·right[k, 2n] + left[m, 2k+1]·right[k, 2n+1], as TDPBF16PS does."""
        self._call(code, "multiply", self._multiply, total, left, right)

    def _of(self, code, registers, number):
        """The address of a register's first row."""
        return code.at(registers, code.b.mul(number, code.number(SIZE)))

    def _fill(self, code, address, size: int, value: float) -> None:
        with cgutils.for_range(code.b, code.number(size // ROW)) as loop:
            line = ir.Constant(ir.VectorType(F32, 16), [value] * 16)
            code.store(line, code.at(address, code.b.mul(loop.index, code.number(ROW))), 1)

    def _copy(self, code, to, to_row, source, source_row) -> None:
        with cgutils.for_range(code.b, code.number(ROWS)) as loop:
            line = code.load(code.at(source, code.b.mul(loop.index, source_row)), ir.VectorType(I8, ROW), 1)
            code.store(line, code.at(to, code.b.mul(loop.index, to_row)), 1)

    def _multiply(self, code, registers, *numbers) -> None:
        b, (c, x, y) = code.b, (self._of(code, registers, number) for number in numbers)
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
