// Layer normalisation, alone and fused with a residual addition; the formulas are in layernorm.py. One warp per row.
#include <common.cuh>

// A lane's part of a row: V vectors of W elements, the lane-th of every 32 vectors; elements beyond the end of the row are 0.
template <class T, int W, int V> struct Row {
    Sum<T> e[V * W];

    __device__ __forceinline__ void read(const T* row, int C) {
#pragma unroll
        for (int v = 0; v < V; v++) {
            const int at = (v * 32 + threadIdx.x % 32) * W;
            if (at < C) {
                const auto some = load<T, W>(row + at);
#pragma unroll
                for (int k = 0; k < W; k++) e[v * W + k] = Sum<T>(some.e[k]);
            } else {
#pragma unroll
                for (int k = 0; k < W; k++) e[v * W + k] = 0;
            }
        }
    }
    __device__ __forceinline__ void write(T* row, int C) const {
#pragma unroll
        for (int v = 0; v < V; v++) {
            const int at = (v * 32 + threadIdx.x % 32) * W;
            if (at < C) store<T, W>(row + at, rounded<T, W>(e + v * W));
        }
    }
    template <class F> __device__ __forceinline__ void each(int C, F f) {               // f(index in the row, element)
#pragma unroll
        for (int v = 0; v < V; v++)
#pragma unroll
            for (int k = 0; k < W; k++) {
                const int at = (v * 32 + threadIdx.x % 32) * W + k;
                if (at < C) f(at, e[v * W + k]);
            }
    }
};

// y, s, x, branch (R, C), mean, rstd (R,), w, b (C,). If branch is not null, s = x + branch is normalised instead of x.
template <class T, int W, int V>
__global__ void __launch_bounds__(128) layernorm_forward(T* y, T* s, Sum<T>* mean, Sum<T>* rstd, const T* x, const T* branch,
                                                         const Sum<T>* w, const Sum<T>* b, long R, int C, double eps) {
    typedef Sum<T> S;
    const long warps = long(gridDim.x) * (blockDim.x / 32);
    Row<T, W, (V > 0 ? V : 1)> scale = {}, shift = {};                  // this lane's part of w and b, the same for all rows
    if constexpr (V > 0) {
        scale.each(C, [&](int at, S& e) { e = w[at]; });
        shift.each(C, [&](int at, S& e) { e = b[at]; });
    }
    for (long r = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; r < R; r += warps) {
        if constexpr (V > 0) {
            Row<T, W, V> row;
            row.read(x + r * C, C);
            if (branch) {
                Row<T, W, V> other;
                other.read(branch + r * C, C);
#pragma unroll
                for (int i = 0; i < V * W; i++) row.e[i] = S(T(row.e[i] + other.e[i]));          // rounded as stored
                row.write(s + r * C, C);
            }
            S total = 0, squares = 0;
#pragma unroll
            for (int i = 0; i < V * W; i++) total += row.e[i];
            const S m = warp_sum(total) / C;
            row.each(C, [&](int, S& e) { squares += (e - m) * (e - m); });
            const S inverse = S(1) / sqrt(warp_sum(squares) / C + S(eps));
#pragma unroll
            for (int i = 0; i < V * W; i++) row.e[i] = (row.e[i] - m) * inverse * scale.e[i] + shift.e[i];
            row.write(y + r * C, C);
            if (threadIdx.x % 32 == 0) mean[r] = m, rstd[r] = inverse;
        } else {
            const T* from = branch ? s + r * C : x + r * C;
            S total = 0, squares = 0;
            for (int at = threadIdx.x % 32; at < C; at += 32) {
                if (branch) s[r * C + at] = T(S(x[r * C + at]) + S(branch[r * C + at]));
                total += S(from[at]);                                   // reads only elements written by the same lane
            }
            const S m = warp_sum(total) / C;
            for (int at = threadIdx.x % 32; at < C; at += 32) squares += (S(from[at]) - m) * (S(from[at]) - m);
            const S inverse = S(1) / sqrt(warp_sum(squares) / C + S(eps));
            for (int at = threadIdx.x % 32; at < C; at += 32) y[r * C + at] = T((S(from[at]) - m) * inverse * w[at] + b[at]);
            if (threadIdx.x % 32 == 0) mean[r] = m, rstd[r] = inverse;
        }
    }
}

// dx, dy, running, x (R, C); partial (parts, 2, C): the part of dw and db of each block, or of each warp if V is 0. dx, dy, running and partial may be null: dx is not
// needed, dy is 0, nothing is added to dx, dw and db are not needed.
template <class T, int W, int V>
__global__ void __launch_bounds__(128, V > 0 && V * W <= 16 && sizeof(T) == 2 ? 4 : 1)
layernorm_backward(T* dx, Sum<T>* partial, const T* dy, const T* running, const T* x,
                                                          const Sum<T>* w, const Sum<T>* mean, const Sum<T>* rstd, long R, int C) {
    typedef Sum<T> S;
    const long warps = long(gridDim.x) * (blockDim.x / 32), first = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if constexpr (V > 0) {
        __shared__ S sums[2][V * W * 32];                               // of the block's warps, for dw and db
        Row<T, W, V> h, g, before, scale, bias;                                 // scale, bias: this lane's sums for dw and db
#pragma unroll
        for (int i = 0; i < V * W; i++) scale.e[i] = bias.e[i] = 0;
        for (long r = first; r < R; r += warps) {
            const S m = mean[r], inverse = rstd[r];
            h.read(x + r * C, C);
            if (dy) g.read(dy + r * C, C);
            if (running) before.read(running + r * C, C);               // early: it is needed after two sums over the warp
            S total = 0, product = 0;
#pragma unroll
            for (int i = 0; i < V * W; i++) {
                if (!dy) g.e[i] = 0;
                h.e[i] = (h.e[i] - m) * inverse;
                scale.e[i] += g.e[i] * h.e[i];
                bias.e[i] += g.e[i];
            }
            if (!dx) continue;
            g.each(C, [&](int at, S& e) { e *= w[at]; });
#pragma unroll
            for (int i = 0; i < V * W; i++) {
                total += g.e[i];
                product += g.e[i] * h.e[i];
            }
            total = warp_sum(total) / C;
            product = warp_sum(product) / C;
#pragma unroll
            for (int i = 0; i < V * W; i++) g.e[i] = inverse * (g.e[i] - total - h.e[i] * product);
            if (running) {
#pragma unroll
                for (int i = 0; i < V * W; i++) g.e[i] += before.e[i];
            }
            g.write(dx + r * C, C);
        }
        if (!partial) return;
        for (int warp = 0; warp < blockDim.x / 32; warp++) {
            if (threadIdx.x / 32 == warp) {
                scale.each(C, [&](int at, S& e) { sums[0][at] = warp ? sums[0][at] + e : e; });
                bias.each(C, [&](int at, S& e) { sums[1][at] = warp ? sums[1][at] + e : e; });
            }
            __syncthreads();
        }
        for (int at = threadIdx.x; at < 2 * C; at += blockDim.x) partial[blockIdx.x * 2l * C + at] = sums[at / C][at % C];
    } else {
        S* mine = partial ? partial + first * 2 * C : nullptr;
        for (int at = threadIdx.x % 32; mine && at < 2 * C; at += 32) mine[at] = 0;
        __syncwarp();                                                   // a lane adds to elements that another lane cleared
        for (long r = first; r < R; r += warps) {
            const S m = mean[r], inverse = rstd[r];
            S total = 0, product = 0;
            for (int at = threadIdx.x % 32; at < C; at += 32) {
                const S d = dy ? S(dy[r * C + at]) : S(0), h = (S(x[r * C + at]) - m) * inverse;
                if (mine) mine[at] += d * h, mine[C + at] += d;
                total += d * w[at];
                product += d * w[at] * h;
            }
            total = warp_sum(total) / C;
            product = warp_sum(product) / C;
            for (int at = threadIdx.x % 32; dx && at < C; at += 32) {
                const S d = dy ? S(dy[r * C + at]) : S(0), h = (S(x[r * C + at]) - m) * inverse;
                dx[r * C + at] = T(inverse * (d * w[at] - total - h * product) + (running ? S(running[r * C + at]) : S(0)));
            }
        }
    }
}

// dw, db (C,) = the sums of partial (parts, 2, C), for as many layers as there are of these; dw and db may be null. A block sums 32
// neighbouring columns of one layer, and each of its 8 warps every eighth part.
#define LAYER(i) S *dw##i, S *db##i, const S *partial##i, long parts##i, int C##i
#define TAKE(i)                                                                                                     \
    if (block >= 0 && block < (2 * C##i + 31) / 32) dw = dw##i, db = db##i, partial = partial##i, parts = parts##i, C = C##i, first = block; \
    block -= (2 * C##i + 31) / 32;

template <class S>
__global__ void __launch_bounds__(256) layernorm_parameters(LAYER(0), LAYER(1), LAYER(2), LAYER(3), LAYER(4), LAYER(5), LAYER(6), LAYER(7),
                                                            LAYER(8), LAYER(9), LAYER(10), LAYER(11), LAYER(12), LAYER(13), LAYER(14),
                                                            LAYER(15)) {
    __shared__ S sums[8][32];
    S *dw = nullptr, *db = nullptr;
    const S* partial = nullptr;
    long parts = 0;
    int C = 0, block = blockIdx.x, first = 0;
    TAKE(0) TAKE(1) TAKE(2) TAKE(3) TAKE(4) TAKE(5) TAKE(6) TAKE(7) TAKE(8) TAKE(9) TAKE(10) TAKE(11) TAKE(12) TAKE(13) TAKE(14) TAKE(15)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long c = long(first) * 32 + lane;
    S total = 0;
    if (c < 2 * C) {
#pragma unroll 4
        for (long part = warp; part < parts; part += 8) total += partial[part * 2 * C + c];
    }
    sums[warp][lane] = total;
    __syncthreads();
    if (warp > 0 || c >= 2 * C) return;
#pragma unroll
    for (int other = 1; other < 8; other++) total += sums[other][lane];
    S* to = c < C ? dw : db;
    if (to) to[c < C ? c : c - C] = total;
}
