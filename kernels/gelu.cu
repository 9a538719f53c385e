// GELU: the formulas are in gelu.py, the functions in gelu.cuh; backward is in cuda/epilogue.cu, as matrix products need it too.
#include <gelu.cuh>

template <class T, int W, bool TANH> __global__ void __launch_bounds__(256) gelu_forward(T* y, const T* x, long size) {
    map<W>(y, x, size, [](T e) { return T(gelu(Sum<T>(e), TANH)); });
}
