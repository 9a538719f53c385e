"""Ops on a CPU: compiling kernels with Numba and running them, exp and erf, bfloat16, strided copies, and the matrix product.

kernel, compile, run     declaration of a kernel, compilation and cache, execution on several threads
math, bfloat16, views    functions that kernels call
tiles, multiply, packing, product, epilogue, gemm       the matrix product, from the register tile up to `gemm`
strided                  copies, sums and arithmetic over arrays with any strides
primitives               the functions for ops composed of other kernels, under the same names as on a GPU
"""

from ...errors import UserError

try:
    import numba  # noqa: F401
except ValueError as error:  # for a variable of the environment, such as NUMBA_NUM_THREADS=0
    raise UserError(f"Numba cannot start: {error} Its settings are the environment variables NUMBA_*") from error
