"""Arrays from addresses, inside kernels: parts of scratch, rows of a block, a head of packed q, k and v."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from .llvm import I64


def item_size(zero: types.Type) -> int:
    return max(1, zero.bitwidth // 8)


@intrinsic
def view(typing_context, zero, address):
    """The elements from an address on, as an array without end; `zero` gives the type of an element."""
    array_type = types.Array(zero, 1, "C")

    def generate(context, b, signature, values):
        item = ir.Constant(I64, item_size(zero))
        endless = ir.Constant(I64, 2**48)
        array = arrayobj.make_array(array_type)(context, b)
        arrayobj.populate_array(
            array,
            data=b.inttoptr(values[1], context.get_data_type(zero).as_pointer()),
            itemsize=item,
            shape=cgutils.pack_array(b, [endless]),
            strides=cgutils.pack_array(b, [item]),
            meminfo=None,
        )
        return array._getvalue()

    return array_type(zero, types.int64), generate


@intrinsic
def item_bytes(typing_context, zero):
    """Bytes of a number of this type."""
    return types.int64(zero), lambda context, b, signature, values: ir.Constant(I64, item_size(zero))


@intrinsic
def zero_of(typing_context, array):
    """A zero of the type of an array's elements."""
    return array.dtype(array), lambda context, b, signature, values: context.get_constant_generic(b, signature.return_type, 0)
