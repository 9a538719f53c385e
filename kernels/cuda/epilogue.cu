// Epilogues of a matrix product that cuBLASLt does not support: see gemm.py.
#include <common.cuh>
#include <gelu.cuh>

enum { NONE, GELU, GELU_TANH };

// pre = p + bias, y = residual + activation(pre), over `size` elements in matrices of rows x columns; bias, pre and residual may be null.
// A vector of W elements never crosses the end of a row.
template <class T, class P, int W, int ACTIVATION>
__global__ void __launch_bounds__(256) finish(T* y, T* pre, const P* p, const Sum<T>* bias, const T* residual, long size, int rows,
                                              int columns, int by_row) {
    typedef Sum<T> S;
    GRID_STRIDE(i, size / W) {
        const long at = i * W;
        int column = 0, row = 0;
        if (bias) column = at % columns, row = by_row ? at / columns % rows : 0;        // divisions of 64 bits: not for nothing
        const auto sum = load<P, W>(p + at);
        Vector<T, W> kept, out, other;
        if (residual) other = load<T, W>(residual + at);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S h = S(sum.e[k]) + (bias ? bias[by_row ? row : column + k] : S(0));
            kept.e[k] = T(h);
            const S a = ACTIVATION == NONE ? h : gelu(h, ACTIVATION == GELU_TANH);
            out.e[k] = T(residual ? a + S(other.e[k]) : a);
        }
        if (pre) store<T, W>(pre + at, kept);
        store<T, W>(y + at, out);
    }
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

// c = scale * sums + extra_scale * extra + diagonal * I, over `size` elements in square matrices with `side` rows; extra may be null.
template <class T>
__global__ void __launch_bounds__(256) add_terms(T* c, const Sum<T>* sums, const T* extra, long size, long side, double scale,
                                                 double extra_scale, double diagonal) {
    typedef Sum<T> S;
    GRID_STRIDE(i, size) {
        S value = S(scale) * sums[i];
        if (extra) value += S(extra_scale) * S(extra[i]);
        if (i % side == i / side % side) value += S(diagonal);
        c[i] = T(value);
    }
}
