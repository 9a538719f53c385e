// GELU: gelu.py has the formulas, gelu.cuh the functions.
#include <gelu.cuh>

template <class T, int W, bool TANH> __global__ void __launch_bounds__(256) gelu_forward(T* y, const T* x, long size) {
    map<W>(y, x, size, [](T e) { return T(gelu(Sum<T>(e), TANH)); });
}

// dx = dy * gelu'(x), a = gelu(x); a may be null, dx may be dy.
template <class T, int W, bool TANH> __global__ void __launch_bounds__(256) gelu_backward(T* dx, T* a, const T* dy, const T* x, long size) {
    GRID_STRIDE(i, size / W) {
        const auto before = load<T, W>(x + i * W), arrived = load<T, W>(dy + i * W);
        Vector<T, W> slope, value;
#pragma unroll
        for (int k = 0; k < W; k++) {
            const Sum<T> v = Sum<T>(before.e[k]);
            const Normal<Sum<T>> n = normal(v, TANH);
            slope.e[k] = T(Sum<T>(arrived.e[k]) * (n.cdf + n.rest));
            value.e[k] = T(v * n.cdf);
        }
        store<T, W>(dx + i * W, slope);
        if (a) store<T, W>(a + i * W, value);
    }
}
