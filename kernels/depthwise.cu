// Depthwise convolution of channels-last maps; the formulas are in depthwise.py.
#include <activation.cuh>

// y[b, u, v] = f(bias + Σ x[b, (u·up + i - top) / down, (v·up + j - left) / down]·w[i, j]), over divisions without rest; with reversed w if
// `flip`. y, pre (B, U, V, C), x (B, H, W, C), w (C, kh, kw), bias (C,); pre and bias may be null. A thread computes W channels.
template <class T, int W>
__global__ void __launch_bounds__(256) gather(T* y, T* pre, const T* x, const Sum<T>* w, const Sum<T>* bias, long B, int height, int width,
                                              int C, int U, int V, int kh, int kw, int up, int down, int top, int left, int flip,
                                              double low, double high, int curved) {
    typedef Sum<T> S;
    const int vectors = C / W, taps = kh * kw;
    GRID_STRIDE(n, B * U * V * vectors) {
        const int c = int(n % vectors) * W, v = int(n / vectors % V), u = int(n / vectors / V % U);
        const long b = n / vectors / V / U;
        S sums[W];
#pragma unroll
        for (int k = 0; k < W; k++) sums[k] = bias ? bias[c + k] : S(0);
        for (int i = 0; i < kh; i++) {
            const int h = u * up + i - top;
            if (h < 0 || h % down || h / down >= height) continue;
            for (int j = 0; j < kw; j++) {
                const int q = v * up + j - left, tap = flip ? taps - 1 - i * kw - j : i * kw + j;
                if (q < 0 || q % down || q / down >= width) continue;
                const auto some = load<T, W>(x + ((b * height + h / down) * width + q / down) * C + c);
#pragma unroll
                for (int k = 0; k < W; k++) sums[k] += S(some.e[k]) * w[long(c + k) * taps + tap];
            }
        }
        Vector<T, W> out;
        if (pre) {
#pragma unroll
            for (int k = 0; k < W; k++) out.e[k] = T(sums[k]);
            store<T, W>(pre + n * W, out);
        }
#pragma unroll
        for (int k = 0; k < W; k++) out.e[k] = T(activated(sums[k], S(low), S(high), bool(curved)));
        store<T, W>(y + n * W, out);
    }
}

template <class T, int W>
__global__ void __launch_bounds__(256) through_activation(T* dz, const T* dy, const T* pre, long size, double low, double high, int curved) {
    typedef Sum<T> S;
    GRID_STRIDE(i, size / W) {
        auto some = load<T, W>(dy + i * W);
        const auto z = load<T, W>(pre + i * W);
#pragma unroll
        for (int k = 0; k < W; k++) some.e[k] = T(S(some.e[k]) * slope(S(z.e[k]), S(low), S(high), bool(curved)));
        store<T, W>(dz + i * W, some);
    }
}

// partial (parts · warps, kh·kw, C): the sums of dy·x over every so many-th position (b, u, v). A block has 32 vectors of columns and TAPS
// taps.
template <class T, int W, int TAPS>
__global__ void __launch_bounds__(256) correlate(Sum<T>* partial, const T* dy, const T* x, int parts, long B, int height, int width, int C,
                                                 int U, int V, int kh, int kw, int stride, int top, int left) {
    typedef Sum<T> S;
    const int across = (C / W + 31) / 32, warps = blockDim.x / 32, taps = kh * kw;
    const int c = int(blockIdx.x % across * 32 + threadIdx.x % 32) * W, first = int(blockIdx.x / across / parts) * TAPS;
    const long lane = long(blockIdx.x / across % parts) * warps + threadIdx.x / 32, lanes = long(parts) * warps;
    if (c >= C) return;
    S sums[TAPS][W] = {};
    for (long n = lane; n < B * U * V; n += lanes) {
        const int v = int(n % V), u = int(n / V % U);
        const auto arrived = load<T, W>(dy + n * C + c);
        const T* map = x + n / V / U * height * width * C + c;
#pragma unroll
        for (int t = 0; t < TAPS; t++) {
            const int h = u * stride + (first + t) / kw - top, q = v * stride + (first + t) % kw - left;
            if (first + t >= taps || h < 0 || h >= height || q < 0 || q >= width) continue;
            const auto some = load<T, W>(map + (long(h) * width + q) * C);
#pragma unroll
            for (int k = 0; k < W; k++) sums[t][k] += S(arrived.e[k]) * S(some.e[k]);
        }
    }
#pragma unroll
    for (int t = 0; t < TAPS; t++)
        if (first + t < taps)
#pragma unroll
            for (int k = 0; k < W; k++) partial[(lane * taps + first + t) * C + c + k] = sums[t][k];
}

// dw (C, taps) = the sums of partial (lanes, taps, C).
template <class S> __global__ void __launch_bounds__(256) collect(S* dw, const S* partial, long lanes, int taps, int C) {
    GRID_STRIDE(n, long(taps) * C) {
        S total = 0;
        for (long lane = 0; lane < lanes; lane++) total += partial[lane * taps * C + n];
        dw[n % C * taps + n / C] = total;
    }
}
