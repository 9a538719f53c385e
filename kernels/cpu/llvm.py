"""Generating LLVM IR with addresses as int64, for the intrinsics of the matrix product."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils

I8, I16, I32, I64, F32, F64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()

X86 = platform.machine() in ("x86_64", "AMD64")


class Code:
    """LLVM's IR builder, with addresses as int64."""

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

    def prefetch(self, address: ir.Value) -> None:
        """Bring a line of memory near."""
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *(ir.Constant(I32, n) for n in (0, 3, 1)))

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(function, arguments)

    def splat(self, scalar: ir.Value, lanes: int) -> ir.Value:
        vector = ir.VectorType(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))

    def variable(self, value: ir.Value) -> ir.Value:
        """The place of a variable, which becomes a register."""
        place = cgutils.alloca_once(self.b, value.type)
        self.b.store(value, place)
        return place

    def loop(self, count: ir.Value, initial: list[ir.Value]) -> Any:
        """Begin a loop of `count` >= 1 iterations with loop-carried values; returns (index, values, end(new values) -> final values)."""
        preceding = self.b.block
        body, after = self.b.append_basic_block("tile.loop"), self.b.append_basic_block("tile.after")
        self.b.branch(body)
        self.b.position_at_end(body)
        index, carried = self.b.phi(I64), [self.b.phi(s.type) for s in initial]

        def end(values: list[ir.Value]) -> list[ir.Value]:
            following = self.b.add(index, self.number(1))
            for phi, start, value in zip([index, *carried], [self.number(0), *initial], [following, *values]):
                phi.add_incoming(start, preceding)
                phi.add_incoming(value, self.b.block)
            self.b.cbranch(self.b.icmp_signed("<", following, count), body, after)
            self.b.position_at_end(after)
            return values

        return index, carried, end
