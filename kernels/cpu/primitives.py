"""The functions for ops composed of other kernels, on a CPU; `cuda/primitives.py` has the same names for a GPU."""

from .gemm import column_sums, gemm, parameter_gradients, row_sums
from .strided import astype, combine, convert, copy, fill, sum_into
from .symmetric import symmetric_product

__all__ = [
    "astype",
    "column_sums",
    "combine",
    "convert",
    "copy",
    "fill",
    "gemm",
    "parameter_gradients",
    "row_sums",
    "sum_into",
    "symmetric_product",
]
