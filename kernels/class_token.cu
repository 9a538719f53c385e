// A class token before the patches, and the position embedding: the formulas are in class_token.py.
#include <common.cuh>

// y (size / row, row), x (size / row, row - C), token (C,), positions (row,).
template <class T, class A, class P, int W>
__global__ void __launch_bounds__(256) class_token_forward(T* y, const T* x, const A* token, const P* positions, long size, long row, int C) {
    typedef Sum<T> S;
    GRID_STRIDE(v, size / W) {
        const long b = v * W / row, at = v * W - b * row;
        const auto position = load<P, W>(positions + at);
        Vector<T, W> out;
        if (at < C) {
            const auto first = load<A, W>(token + at);
#pragma unroll
            for (int k = 0; k < W; k++) out.e[k] = T(S(first.e[k]));    // rounded as x is
        } else
            out = load<T, W>(x + b * (row - C) + at - C);
#pragma unroll
        for (int k = 0; k < W; k++) out.e[k] = T(S(out.e[k]) + S(position.e[k]));
        store<T, W>(y + v * W, out);
    }
}

// dx (B, row - C) = dy (B, row) without the first C of each row; partial (parts, row): the sums of each part of the rows. Either may be null.
template <class T, int W>
__global__ void __launch_bounds__(256) class_token_backward(T* dx, Sum<T>* partial, const T* dy, long B, long row, int C, long parts) {
    const long vectors = row / W;
    GRID_STRIDE(v, parts * vectors) {
        const long part = v / vectors, at = v % vectors * W, last = (part + 1) * B / parts;
        Sum<T> sums[W] = {};
#pragma unroll 4
        for (long b = part * B / parts; b < last; b++) {
            const auto some = load<T, W>(dy + b * row + at);
            if (dx && at >= C) store<T, W>(dx + b * (row - C) + at - C, some);
#pragma unroll
            for (int k = 0; k < W; k++) sums[k] += Sum<T>(some.e[k]);
        }
#pragma unroll
        for (int k = 0; k < W; k++)
            if (partial) partial[part * row + at + k] = sums[k];
    }
}
