"""Arrays that share memory with those of other libraries, by DLPack (https://dmlc.github.io/dlpack/latest/c_api.html).

NumPy knows no bfloat16. Such an array goes through NumPy as unsigned integers of 16 bits, and its capsule is given the other type, since a
capsule that is not consumed yet belongs to whoever holds it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .devices import runtime
from .dtypes import BFLOAT16

UNSIGNED, BFLOAT = 1, 4  # DLDataTypeCode
CUDA = 2  # DLDeviceType
ON_CPU = (1, 3, 13)  # ordinary memory, and CUDA's pinned and managed memory
BITS = np.dtype(np.uint16)


class Type(ctypes.Structure):
    """DLDataType."""

    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class Described(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", Type),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned; DLManagedTensor, which came before it, begins with the DLTensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Described),
    )


_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


def described(capsule: Any) -> Described:
    """What a capsule that nobody has consumed says of its array; it may be changed. Raises BufferError for another object."""
    for name, offset in ((b"dltensor", 0), (b"dltensor_versioned", Versioned.tensor.offset)):
        if _is_valid(capsule, name):
            return Described.from_address(_pointer(capsule, name) + offset)
    raise BufferError("__dlpack__ returned no capsule of DLPack")


def to_capsule(array: Any, **options: Any) -> Any:
    """A capsule that shares an array's memory. options: those of `__dlpack__` in the array API standard. Raises BufferError."""
    is_bfloat16 = array.dtype == BFLOAT16
    if isinstance(array, np.ndarray):
        knows_read_only = options.get("copy") or (options.get("max_version") or (0,))[0] >= 1
        if not (array.flags.writeable or knows_read_only):
            raise BufferError("the other library knows no read-only arrays: give it a copy, as Tensor(x.numpy().copy())")
        capsule = (array.view(BITS) if is_bfloat16 else array).__dlpack__(**options)
    else:
        capsule = runtime().to_capsule(runtime().subarray(array, 0, array.shape, BITS) if is_bfloat16 else array, **options)
    if is_bfloat16:
        described(capsule).dtype.code = BFLOAT
    return capsule


class _Source:
    """An array of another library, whose capsules say integers where the array is bfloat16."""

    def __init__(self, array: Any) -> None:
        self.array, self.is_bfloat16 = array, False

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.array.__dlpack__(**options)
        kind = described(capsule).dtype
        if (kind.code, kind.bits, kind.lanes) == (BFLOAT, 16, 1):
            self.is_bfloat16, kind.code = True, UNSIGNED
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def from_capsule(array: Any) -> Any:
    """An array of NumPy, or of the GPU's runtime, that shares the memory of an array of another library.

    Raises TypeError for what does not speak DLPack, BufferError for another device or type, and whatever the other library raises.
    """
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        raise TypeError(f"from_dlpack takes an array that has __dlpack__, not {type(array).__name__}: Tensor() takes others")
    source, device = _Source(array), int(array.__dlpack_device__()[0])
    if device == CUDA:
        shared = runtime().from_dlpack(source)
        return runtime().subarray(shared, 0, shared.shape, BFLOAT16) if source.is_bfloat16 else shared
    if device not in ON_CPU:
        raise BufferError(f"the array lies on a device that minivit does not know, number {device} of DLPack: move it to the CPU")
    try:
        shared = np.from_dlpack(source)
    except RuntimeError as error:  # NumPy's for a type that it does not know
        raise BufferError(f"the array's type is none of NumPy's: {error}") from error
    return shared.view(BFLOAT16) if source.is_bfloat16 else shared
