"""Words of memory that threads share: atomic access to the int64 at an address, in one order that all threads see; and waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .llvm import I8, I32, I64, X86, Code


def _operation(arguments: int, generate: Callable[[Any, list[Any]], Any]) -> Any:
    """An intrinsic of so many int64 that returns an int64, which `generate(builder, values)` computes."""
    signature = types.int64(*[types.int64] * arguments)

    def codegen(context, builder, signature, values):
        return generate(builder, values)

    if arguments == 0:
        return intrinsic(lambda typing_context: (signature, codegen))
    if arguments == 1:
        return intrinsic(lambda typing_context, a: (signature, codegen))
    if arguments == 2:
        return intrinsic(lambda typing_context, a, b: (signature, codegen))
    return intrinsic(lambda typing_context, a, b, c: (signature, codegen))


def _word(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


def _store(builder, values):
    builder.store_atomic(values[1], _word(builder, values[0]), ordering="seq_cst", align=8)
    return values[1]


def _libc(name: str, result: ir.Type, *arguments: ir.Type) -> Callable[[Any, list[Any]], Any]:
    """A call of a function of the C library; addresses are int64."""

    def generate(builder, values):
        given = [
            builder.inttoptr(v, a) if isinstance(a, ir.PointerType) else builder.trunc(v, a) if a != I64 else v
            for v, a in zip(values, arguments)
        ]
        found = Code(builder).call(name, result, *given)
        return found if result == I64 else builder.sext(found, I64)

    return generate


def _pause(builder, values):
    name, arguments = ("llvm.x86.sse2.pause", []) if X86 else ("llvm.aarch64.hint", [ir.Constant(I32, 1)])
    Code(builder).call(name, ir.VoidType(), *arguments)
    return ir.Constant(I64, 0)


load = _operation(1, lambda builder, values: builder.load_atomic(_word(builder, values[0]), ordering="seq_cst", align=8))
store = _operation(2, _store)
add = _operation(2, lambda builder, values: builder.atomic_rmw("add", _word(builder, values[0]), values[1], "seq_cst"))  # the old value
exchange = _operation(2, lambda builder, values: builder.atomic_rmw("xchg", _word(builder, values[0]), values[1], "seq_cst"))
pause = _operation(0, _pause)  # tells the core that a loop waits
give_way = _operation(0, _libc("sched_yield", I32))  # lets another thread run on this core
read = _operation(3, _libc("read", I64, I32, I8.as_pointer(), I64))  # file descriptor, address, bytes
write = _operation(3, _libc("write", I64, I32, I8.as_pointer(), I64))
