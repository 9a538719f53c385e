"""The functions for ops composed of other kernels, on a GPU; `cpu/primitives.py` has the same names for a CPU."""

from .gemm import column_sums, gemm, parameter_gradients, row_sums, symmetric_product
from .strided import astype, combine, contiguous, convert, copy, fill, sum_into, take

__all__ = [
    "astype",
    "column_sums",
    "combine",
    "contiguous",
    "convert",
    "copy",
    "fill",
    "gemm",
    "parameter_gradients",
    "row_sums",
    "sum_into",
    "symmetric_product",
    "take",
]
