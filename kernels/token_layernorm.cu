// Layer normalisation over tokens; the formulas are in token_layernorm.py. A block processes 32 vectors of channels of one sample: one per
// lane, and every eighth token per warp; repeated reads hit the cache.
#include <common.cuh>

const int WARPS = 8;

template <class S, int W> struct Shares {
    S of[WARPS][W][32];
};

// The sums over all warps, in every lane for its own channels.
template <class S, int W> __device__ __forceinline__ void sum_warps(S (&sums)[W], Shares<S, W>& shares) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < W; k++) shares.of[warp][k][lane] = sums[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < W; k++) {
        sums[k] = 0;
        for (int w = 0; w < WARPS; w++) sums[k] += shares.of[w][k][lane];
    }
    __syncthreads();
}

// x, y (B, N, C), mean, rstd (B, C), w, b (N,); `across` blocks per sample.
template <class T, int W>
__global__ void __launch_bounds__(256) token_layernorm_forward(T* y, Sum<T>* mean, Sum<T>* rstd, const T* x, const Sum<T>* w, const Sum<T>* b,
                                                               int across, int N, int C, double eps) {
    typedef Sum<T> S;
    __shared__ Shares<S, W> shares;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.x % across * 32 + lane) * W;
    const long sample = blockIdx.x / across, start = sample * N * C + c;
    const bool inside = c < C;
    S m[W] = {}, r[W] = {};
    for (int n = warp; inside && n < N; n += WARPS) {
        const auto some = load<T, W>(x + start + long(n) * C);
#pragma unroll
        for (int k = 0; k < W; k++) m[k] += S(some.e[k]);
    }
    sum_warps(m, shares);
#pragma unroll
    for (int k = 0; k < W; k++) m[k] /= N;
    for (int n = warp; inside && n < N; n += WARPS) {
        const auto some = load<T, W>(x + start + long(n) * C);
#pragma unroll
        for (int k = 0; k < W; k++) r[k] += (S(some.e[k]) - m[k]) * (S(some.e[k]) - m[k]);
    }
    sum_warps(r, shares);
#pragma unroll
    for (int k = 0; k < W; k++) {
        r[k] = S(1) / sqrt(r[k] / N + S(eps));
        if (inside && warp == 0) mean[sample * C + c + k] = m[k], rstd[sample * C + c + k] = r[k];
    }
    for (int n = warp; inside && n < N; n += WARPS) {
        auto some = load<T, W>(x + start + long(n) * C);
#pragma unroll
        for (int k = 0; k < W; k++) some.e[k] = T((S(some.e[k]) - m[k]) * r[k] * w[n] + b[n]);
        store<T, W>(y + start + long(n) * C, some);
    }
}

// dw, db (blocks, N): each block's part. dx and dw (with db) may be null if not needed; running, if nothing is added to dx.
template <class T, int W>
__global__ void __launch_bounds__(256) token_layernorm_backward(T* dx, Sum<T>* dw, Sum<T>* db, const T* dy, const T* running, const T* x,
                                                                const Sum<T>* w, const Sum<T>* mean, const Sum<T>* rstd, int across, int N,
                                                                int C) {
    typedef Sum<T> S;
    __shared__ Shares<S, W> shares;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = (blockIdx.x % across * 32 + lane) * W;
    const long sample = blockIdx.x / across, start = sample * N * C + c;
    const bool inside = c < C;
    S m[W], r[W], total[W] = {}, product[W] = {};
#pragma unroll
    for (int k = 0; k < W; k++) {
        m[k] = inside ? mean[sample * C + c + k] : S(0);
        r[k] = inside ? rstd[sample * C + c + k] : S(0);
    }
    for (int n = warp; n < N; n += WARPS) {
        S weight = 0, bias = 0;
        if (inside) {
            const auto arrived = load<T, W>(dy + start + long(n) * C), some = load<T, W>(x + start + long(n) * C);
#pragma unroll
            for (int k = 0; k < W; k++) {
                const S d = S(arrived.e[k]), h = (S(some.e[k]) - m[k]) * r[k];
                total[k] += d * w[n];
                product[k] += d * w[n] * h;
                weight += d * h;
                bias += d;
            }
        }
        if (dw) {
            weight = warp_sum(weight);
            bias = warp_sum(bias);
            if (lane == 0) dw[long(blockIdx.x) * N + n] = weight, db[long(blockIdx.x) * N + n] = bias;
        }
    }
    if (!dx) return;
    sum_warps(total, shares);
    sum_warps(product, shares);
    for (int n = warp; inside && n < N; n += WARPS) {
        const long at = start + long(n) * C;
        const auto arrived = load<T, W>(dy + at), some = load<T, W>(x + at);
        Vector<T, W> out, before;
        if (running) before = load<T, W>(running + at);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S h = (S(some.e[k]) - m[k]) * r[k], d = r[k] * (S(arrived.e[k]) * w[n] - total[k] / N - h * product[k] / N);
            out.e[k] = T(running ? d + S(before.e[k]) : d);
        }
        store<T, W>(dx + at, out);
    }
}
