"""Ops on a CPU: how kernels are compiled by Numba and run, exp and erf, bfloat16, strided copies, and the matrix product.

kernel, compile, run     a kernel's declaration, its compilation and cache, its run on several threads
math, bfloat16, views    what kernels call
tiles, multiply, packing, product, epilogue, gemm       the product, from a tile in registers up to the call
strided                  copies, sums and arithmetic over arrays of any strides
primitives               the functions that ops made of other kernels call, by the names that they have on a GPU too
"""
