"""Ops on a GPU: how CUDA kernels are named, compiled and run, cuBLASLt, and what the .cu files share (*.cuh).

kernel                   a kernel's name and arguments, its grid
nvrtc, compiled          NVIDIA's run-time compiler; what was compiled is kept
product, cublaslt, gemm  the matrix product, by cuBLASLt
strided                  copies, sums and arithmetic over arrays of any strides
primitives               the functions that ops made of other kernels call, by the names that they have on a CPU too
cupy_runtime             arrays, launches and graphs, by CuPy
"""
