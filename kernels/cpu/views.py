"""Arrays and kernels from addresses, inside kernels: parts of scratch memory, rows of a block, one head of packed q, k and v."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from .llvm import I64


def item_size(zero: types.Type) -> int:
    """Bytes per element of a Numba type."""
    return max(1, zero.bitwidth // 8)


@intrinsic
def view(typing_context, zero, address):
    """An array of unlimited length that starts at an address; `zero` defines the element type."""
    array_type = types.Array(zero, 1, "C")

    def generate(context, b, signature, values):
        item = ir.Constant(I64, item_size(zero))
        length = ir.Constant(I64, 2**48)
        array = arrayobj.make_array(array_type)(context, b)
        arrayobj.populate_array(
            array,
            data=b.inttoptr(values[1], context.get_data_type(zero).as_pointer()),
            itemsize=item,
            shape=cgutils.pack_array(b, [length]),
            strides=cgutils.pack_array(b, [item]),
            meminfo=None,
        )
        return array._getvalue()

    return array_type(zero, types.int64), generate


@intrinsic
def item_bytes(typing_context, zero):
    """Bytes per element of this type."""
    return types.int64(zero), lambda context, b, signature, values: ir.Constant(I64, item_size(zero))


@intrinsic
def zero_of(typing_context, array):
    """A zero of an array's element type."""
    return array.dtype(array), lambda context, b, signature, values: context.get_constant_generic(b, signature.return_type, 0)


@intrinsic
def call_entry(typing_context, address, band, table):
    """Run one band of a compiled kernel."""

    def generate(context, builder, signature, values):
        function = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [I64, I64]).as_pointer())
        builder.call(function, values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
