// Arithmetic with broadcasting, GELU and softmax: pointwise.py has the formulas.
#include <gelu.cuh>
#include <loops.cuh>

enum { PLUS, TIMES, OVER };

// y = a + sign * b, a * b or a / b; W > 1: the inner loop steps through y by 1, and through a and b too, unless they repeat one element.
template <class Y, class A, class B, int OPERATION, int W, bool A_REPEATS, bool B_REPEATS>
__global__ void __launch_bounds__(256) combine(Y* y, const A* a, const B* b, LOOP_SIZES, STEPS(y), STEPS(a), STEPS(b), long to, long a_from,
                                               long b_from, double sign) {
    typedef Wider<Y, Wider<A, B>> S;
    GRID_STRIDE(vector, vectors) {
        const Place at = place<W>(vector, n1, n2, n3);
        const auto left = load_or_repeat<A, W, A_REPEATS>(a + a_from + AT(at, a));
        const auto right = load_or_repeat<B, W, B_REPEATS>(b + b_from + AT(at, b));
        Vector<Y, W> out;
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S u = S(left.e[k]), v = S(right.e[k]);
            out.e[k] = Y(OPERATION == PLUS ? u + S(sign) * v : OPERATION == TIMES ? u * v : u / v);
        }
        store<Y, W>(y + to + AT(at, y), out);
    }
}

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

// A warp a row of (R, C); what it reads again lies in its cache.
template <class T> __global__ void __launch_bounds__(256) softmax_forward(T* y, const T* x, long R, int C) {
    typedef Sum<T> S;
    const long warps = long(gridDim.x) * (blockDim.x / 32);
    const int lane = threadIdx.x % 32;
    for (long r = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; r < R; r += warps) {
        S top = S(x[r * C]), total = 0;
        for (int c = lane; c < C; c += 32) top = larger(top, S(x[r * C + c]));
        top = warp_max(top);
        for (int c = lane; c < C; c += 32) total += exp(S(x[r * C + c]) - top);
        const S inverse = S(1) / warp_sum(total);
        for (int c = lane; c < C; c += 32) y[r * C + c] = T(exp(S(x[r * C + c]) - top) * inverse);
    }
}

template <class T> __global__ void __launch_bounds__(256) softmax_backward(T* dx, const T* dy, const T* y, long R, int C) {
    typedef Sum<T> S;
    const long warps = long(gridDim.x) * (blockDim.x / 32);
    const int lane = threadIdx.x % 32;
    for (long r = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; r < R; r += warps) {
        S total = 0;
        for (int c = lane; c < C; c += 32) total += S(dy[r * C + c]) * S(y[r * C + c]);
        total = warp_sum(total);
        for (int c = lane; c < C; c += 32) dx[r * C + c] = T(S(y[r * C + c]) * (S(dy[r * C + c]) - total));
    }
}
