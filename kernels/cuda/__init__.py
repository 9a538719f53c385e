"""Ops on a GPU: naming, compiling and running CUDA kernels, cuBLASLt, and the headers of the .cu files (*.cuh).

kernel                   a kernel's name, arguments and grid
nvrtc, compiled          NVIDIA's run-time compiler, and the cache of compiled kernels
product, cublaslt, gemm  the matrix product, by cuBLASLt
choices                  which of its algorithms a product takes
strided                  copies, sums and arithmetic over arrays with any strides
primitives               the functions for ops composed of other kernels, under the same names as on a CPU
cupy_runtime             arrays, launches and graphs, by CuPy
"""
