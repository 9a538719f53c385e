"""bfloat16 inside kernels: two bytes in memory, float32 in a register.

Kernels need no separate source for bfloat16 arrays: reading an element widens it to float32 and writing rounds to nearest even, so that
all arithmetic is in float32. A bfloat16 is the upper half of a float32: sign, 8 bits of exponent, 7 bits of fraction.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import imputils, typeconv
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default
from numba.extending import box, intrinsic, unbox

from .llvm import F32, I16, I32

NATIVE = bool(llvm.get_host_cpu_features().get("avx512bf16"))  # whether this CPU rounds to bfloat16 in one instruction


class LLVMBFloat(ir.types.Type):
    """LLVM's type `bfloat`, which llvmlite does not define."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self))

    def __hash__(self) -> int:
        return hash(type(self))


BFLOAT = LLVMBFloat()


class BFloat16(types.Float):
    """The Numba type of a bfloat16 element."""

    def __init__(self) -> None:
        types.Number.__init__(self, name="bfloat16")
        self.bitwidth = 16

    def __str__(self) -> str:
        return "float16"  # the name under which Numba asks NumPy for type promotion

    def cast_python_value(self, value: Any) -> np.float32:
        return np.float32(value)


bfloat16 = BFloat16()


def _like(value: ir.Value, type_: ir.Type) -> ir.Type:
    """`type_`, or a vector of it if `value` is a vector."""
    return ir.VectorType(type_, value.type.count) if isinstance(value.type, ir.VectorType) else type_


def _constant_like(value: ir.Value, number: int) -> ir.Constant:
    vector = isinstance(value.type, ir.VectorType)
    return ir.Constant(_like(value, I32), [number] * value.type.count if vector else number)


def widen(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """bfloat16 bits (i16, or a vector of them) converted to float32."""
    return builder.bitcast(builder.shl(builder.zext(bits, _like(bits, I32)), _constant_like(bits, 16)), _like(bits, F32))


def round_to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A float32, or a vector of them, rounded to bfloat16 bits (i16): to nearest even; NaN stays NaN."""
    if NATIVE:
        return builder.bitcast(builder.fptrunc(value, _like(value, BFLOAT)), _like(value, I16))
    bits, sixteen = builder.bitcast(value, _like(value, I32)), _constant_like(value, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant_like(value, 1))
    rounded = builder.add(bits, builder.add(odd, _constant_like(value, 0x7FFF)))
    quiet = builder.or_(bits, _constant_like(value, 0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, sixteen), _like(value, I16))


@register_default(BFloat16)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, type_) -> None:
        super().__init__(manager, type_, F32)

    def get_data_type(self):
        return I16

    def as_data(self, builder, value):
        return round_to_bfloat16(builder, value)

    def from_data(self, builder, value):
        return widen(builder, value)

    def load_from_data_pointer(self, builder, pointer, align=None):
        return widen(builder, builder.load(pointer, align=align))


_rules = typeconv.rules.default_casting_rules
_rules.promote_unsafe(bfloat16, types.float32)
_rules.unsafe_unsafe(types.int64, bfloat16)


@imputils.lower_cast(BFloat16, types.Float)
def _to_float(context, builder, source, target, value):
    return value if isinstance(target, BFloat16) else context.cast(builder, value, types.float32, target)


@imputils.lower_cast(types.Float, BFloat16)
@imputils.lower_cast(types.Integer, BFloat16)
@imputils.lower_cast(types.IntegerLiteral, BFloat16)
def _from_number(context, builder, source, target, value):
    return value if isinstance(source, BFloat16) else context.cast(builder, value, source, types.float32)


@unbox(BFloat16)
def _unbox(type_, value, context):
    return context.unbox(types.float32, value)


@box(BFloat16)
def _box(type_, value, context):
    return context.box(types.float32, value)


@imputils.lower_constant(BFloat16)
def _constant(context, builder, type_, value):
    return ir.Constant(F32, float(value))


@intrinsic
def rounded(typing_context, x):
    """A float32 rounded to bfloat16, as float32."""
    return types.float32(types.float32), lambda context, b, signature, values: widen(b, round_to_bfloat16(b, values[0]))
