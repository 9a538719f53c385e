"""Vectors of a fixed number of elements, for kernels whose loops LLVM does not turn into such by itself.

A vector holds float32, or float64 if its array does; bfloat16 is widened when it is loaded and rounded when it is stored. It may be longer
than a register of the CPU, and takes several of them then.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from .bfloat16 import BFloat16, round_to_bfloat16, widen
from .llvm import F32, F64, I16, Code
from .tiles import host_tile
from .views import item_size

REGISTER = host_tile("float32").lane_bytes  # bytes


class VectorType(types.Type):
    """The Numba type of a vector."""

    def __init__(self, double: bool, lanes: int) -> None:
        self.double, self.lanes = double, lanes
        super().__init__(name=f"Vector({'float64' if double else 'float32'}, {lanes})")

    @property
    def ir(self) -> ir.VectorType:
        return ir.VectorType(F64 if self.double else F32, self.lanes)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: VectorType) -> None:
        super().__init__(manager, type_, type_.ir)


class Functions(NamedTuple):
    """Functions of vectors of one length, inside kernels. `zero` is a number that carries the dtype of the elements in memory."""

    load: Any  # (zero, address): the vector at an address
    store: Any  # (zero, address, vector)
    multiply_add: Any  # (a, b, c): a·b + c
    zeros: Any  # (zero)
    prefetch: Any  # (address): bring the line of memory near
    activate: Any  # (vector, low, high, curved): one of activations.py


def _vector(zero: types.Type, lanes: int) -> VectorType:
    return VectorType(zero == types.float64, lanes)


@cache
def functions(lanes: int) -> Functions:
    """The functions of vectors with so many elements."""

    @intrinsic
    def load(typing_context, zero, address):
        vector = _vector(zero, lanes)

        def generate(context, builder, signature, values):
            code = Code(builder)
            if isinstance(zero, BFloat16):
                return widen(builder, code.load(values[1], ir.VectorType(I16, lanes), align=2))
            return code.load(values[1], vector.ir, align=item_size(zero))

        return vector(zero, types.int64), generate

    @intrinsic
    def store(typing_context, zero, address, vector):
        def generate(context, builder, signature, values):
            bits = round_to_bfloat16(builder, values[2]) if isinstance(zero, BFloat16) else values[2]
            Code(builder).store(bits, values[1], align=item_size(zero))
            return context.get_dummy_value()

        return types.void(zero, types.int64, vector), generate

    @intrinsic
    def multiply_add(typing_context, a, b, c):
        def generate(context, builder, signature, values):
            return Code(builder).call(f"llvm.fmuladd.v{lanes}f{64 if c.double else 32}", c.ir, *values)

        return c(a, b, c), generate

    @intrinsic
    def zeros(typing_context, zero):
        vector = _vector(zero, lanes)
        return vector(zero), lambda context, builder, signature, values: ir.Constant(vector.ir, [0.0] * lanes)

    @intrinsic
    def prefetch(typing_context, address):
        def generate(context, builder, signature, values):
            Code(builder).prefetch(values[0])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    @intrinsic
    def activate(typing_context, vector, low, high, curved):
        def generate(context, builder, signature, values):
            def constant(value: float) -> ir.Constant:
                return ir.Constant(vector.ir, [value] * lanes)

            def clip(x: ir.Value, lowest: ir.Value, highest: ir.Value) -> ir.Value:  # NaN stays NaN
                x = builder.select(builder.fcmp_ordered(">", x, highest), highest, x)
                return builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)

            z, *bounds, is_curved = values
            sixth = builder.fmul(clip(builder.fadd(z, constant(3.0)), constant(0.0), constant(6.0)), constant(1 / 6))
            clipped = clip(z, *(Code(builder).splat(bound, lanes) for bound in bounds))
            return builder.select(builder.icmp_signed("!=", is_curved, ir.Constant(is_curved.type, 0)), builder.fmul(z, sixth), clipped)

        number = types.float64 if vector.double else types.float32
        return vector(vector, number, number, types.int64), generate

    return Functions(load, store, multiply_add, zeros, prefetch, activate)
