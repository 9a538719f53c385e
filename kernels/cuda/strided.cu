// Copies over nested loops, transposes, conversions, arithmetic with broadcasting, and sums: see strided.py.
#include <loops.cuh>

template <class A, class B> struct SameType { static constexpr bool value = false; };
template <class A> struct SameType<A, A> { static constexpr bool value = true; };

template <class Y, class X, bool SCALED> __device__ __forceinline__ Y converted(X x, double scale) {
    typedef Wider<Y, X> S;
    if constexpr (SCALED) return Y(S(x) * S(scale));
    else if constexpr (SameType<Y, X>::value) return x;                 // also for integers
    else return Y(S(x));
}

// y = scale * x; if W > 1, the inner loop has stride 1 in y and also in x, unless it REPEATS one element of x.
template <class Y, class X, int W, bool REPEATS, bool SCALED>
__global__ void __launch_bounds__(256) copy(Y* y, const X* x, LOOP_SIZES, STEPS(y), STEPS(x), long to, long from, double scale) {
    GRID_STRIDE(vector, vectors) {
        const Place at = place<W>(vector, n1, n2, n3);
        const auto some = load_or_repeat<X, W, REPEATS>(x + from + AT(at, x));
        Vector<Y, W> out;
#pragma unroll
        for (int k = 0; k < W; k++) out.e[k] = converted<Y, X, SCALED>(some.e[k], scale);
        store<Y, W>(y + to + AT(at, y), out);
    }
}

template <class Y, class X, int W> __global__ void __launch_bounds__(256) convert(Y* y, const X* x, long size) {
    map<W>(y, x, size, [](X e) { return converted<Y, X, false>(e, 1); });
}

template <class T, int W> __global__ void __launch_bounds__(256) fill(T* y, long size, double value) {
    Vector<T, W> all;
#pragma unroll
    for (int k = 0; k < W; k++) all.e[k] = T(value);
    GRID_STRIDE(i, size / W) store<T, W>(y + i * W, all);
}

// y[a, b, j, i] = scale * x[a, b, i, j] for i < I, j < J: the strides of y are 1 along i and y_step along j, those of x 1 along j and
// x_step along i. A block moves a 32 x 32 square through shared memory; its rows are padded by one element to avoid bank conflicts.
template <class Y, class X>
__global__ void __launch_bounds__(256) transpose(Y* y, const X* x, u32 I, u32 J, long y_step, long x_step, u32 B, long y_a, long y_b,
                                                 long x_a, long x_b, long to, long from, double scale) {
    __shared__ X square[32][33];                                        // [i][j]
    const u32 across = (I + 31) / 32, down = (J + 31) / 32, ab = blockIdx.x / (across * down);
    const u32 first_i = blockIdx.x % across * 32, first_j = blockIdx.x / across % down * 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    y += to + ab / B * y_a + ab % B * y_b;
    x += from + ab / B * x_a + ab % B * x_b;
#pragma unroll
    for (int i = warp; i < 32; i += 8)
        if (first_i + i < I && first_j + lane < J) square[i][lane] = x[(first_i + i) * x_step + first_j + lane];
    __syncthreads();
#pragma unroll
    for (int j = warp; j < 32; j += 8)
        if (first_i + lane < I && first_j + j < J) {
            const X value = square[lane][j];
            y[(first_j + j) * y_step + first_i + lane] = scale == 1 ? converted<Y, X, false>(value, 1) : converted<Y, X, true>(value, scale);
        }
}

// Adds the products of W adjacent elements; without TWO, q is 1. Known when compiled, so that the loads of several rows are in flight.
template <class S, int W, bool TWO, class P, class Q> __device__ __forceinline__ void add_products(S (&sums)[W], const P* p, const Q* q) {
    const auto some = load<P, W>(p);
    if constexpr (TWO) {
        const auto others = load<Q, W>(q);
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] += S(some.e[k]) * S(others.e[k]);
    } else {
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] += S(some.e[k]);
    }
}

// y[a, part, c] = scale * the sum of p[a, r, c] * q[a, r, c] over the part-th of the parts of R. A block sums 32 vectors of columns; each
// of its 8 warps takes every eighth row.
template <class Y, class P, class Q, int W, bool TWO>
__global__ void __launch_bounds__(256) sum_columns(Y* y, const P* p, const Q* q, long R, int C, int parts, double scale) {
    typedef Wider<P, Q> S;
    __shared__ S shares[8][W][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = (C / W + 31) / 32;
    const int first = blockIdx.x % across * 32 * W, column = first + lane * W;
    const long part = blockIdx.x / across % parts, a = blockIdx.x / across / parts;
    S sums[W] = {};
    if (column < C) {
        p += a * R * C + column;
        if (TWO) q += a * R * C + column;
#pragma unroll 4
        for (long r = part * R / parts + warp; r < (part + 1) * R / parts; r += 8)
            add_products<S, W, TWO>(sums, p + r * C, TWO ? q + r * C : q);
    }
#pragma unroll
    for (int k = 0; k < W; k++) shares[warp][k][lane] = sums[k];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * W && first + i < C; i += 256) {
        S total = 0;
        for (int w = 0; w < 8; w++) total += shares[w][i % W][i / W];
        y[(a * parts + part) * C + first + i] = Y(total * S(scale));
    }
}

// y[a, part] = scale * the sum of p[a, r] * q[a, r] over the part-th of the parts of R, one warp per sum; items: number of all sums.
template <class Y, class P, class Q, int W, bool TWO>
__global__ void __launch_bounds__(256) sum_rows(Y* y, const P* p, const Q* q, long items, long R, int parts, double scale) {
    typedef Wider<P, Q> S;
    const long warps = long(gridDim.x) * (blockDim.x / 32), vectors = R / W;
    for (long item = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; item < items; item += warps) {
        const long a = item / parts, part = item % parts, last = (part + 1) * vectors / parts;
        S sums[W] = {}, total = 0;
#pragma unroll 4
        for (long v = part * vectors / parts + threadIdx.x % 32; v < last; v += 32)
            add_products<S, W, TWO>(sums, p + a * R + v * W, TWO ? q + a * R + v * W : q);
#pragma unroll
        for (int k = 0; k < W; k++) total += sums[k];
        total = warp_sum(total);
        if (threadIdx.x % 32 == 0) y[item] = Y(total * S(scale));
    }
}

enum { ADD, MULTIPLY, DIVIDE, POWER, POWER_BY_BASE, POWER_BY_EXPONENT, MAXIMUM, MINIMUM, IS_LARGER };           // as in core/strides.py

template <class S> __device__ __forceinline__ S power(S u, S v) { return v == 1 ? u : v == 2 ? u * u : pow(u, v); }

template <class S> __device__ __forceinline__ S other_operation(int operation, S u, S v) {
    switch (operation) {
        case POWER: return power(u, v);
        case POWER_BY_BASE: return v == 0 ? S(0) : v * power(u, v - 1);
        case POWER_BY_EXPONENT: return u == 0 && v >= 0 ? S(0) : power(u, v) * log(u);
        case MAXIMUM: return u > v || u != u ? u : v;                   // NaN if one is
        case MINIMUM: return u < v || u != u ? u : v;
        default: return u > v ? S(1) : u == v ? S(0.5) : S(0);
    }
}

// y = a + sign * b, a * b or a / b, or one of the OTHERS, whose code is longer; if W > 1, the inner loop has stride 1 in y, and in a and b
// unless they repeat one element.
template <class Y, class A, class B, int W, bool A_REPEATS, bool B_REPEATS, bool OTHERS>
__global__ void __launch_bounds__(256) combine(Y* y, const A* a, const B* b, LOOP_SIZES, STEPS(y), STEPS(a), STEPS(b), long to, long a_from,
                                               long b_from, int operation, double sign) {
    typedef Wider<Y, Wider<A, B>> S;
    GRID_STRIDE(vector, vectors) {
        const Place at = place<W>(vector, n1, n2, n3);
        const auto left = load_or_repeat<A, W, A_REPEATS>(a + a_from + AT(at, a));
        const auto right = load_or_repeat<B, W, B_REPEATS>(b + b_from + AT(at, b));
        Vector<Y, W> out;
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S u = S(left.e[k]), v = S(right.e[k]);
            if constexpr (OTHERS) out.e[k] = Y(other_operation(operation, u, v));
            else out.e[k] = Y(operation == ADD ? u + S(sign) * v : operation == MULTIPLY ? u * v : u / v);
        }
        store<Y, W>(y + to + AT(at, y), out);
    }
}
