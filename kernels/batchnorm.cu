// Batch normalisation with the activation that follows it, and running statistics; the formulas are in batchnorm.py.
//
// x, y and their gradients are (R, C). A thread owns W adjacent columns and every so many-th row: a "lane" is a warp of these rows.
#include <activation.cuh>

struct Share {                                                          // what a thread owns
    int column;                                                         // the first of its columns; C or more: none
    long lane, lanes;                                                   // its rows: lane, lane + lanes, ...
};

template <int W> __device__ __forceinline__ Share share(int C) {
    const int across = (C / W + 31) / 32, warps = blockDim.x / 32;
    return {int(blockIdx.x % across * 32 + threadIdx.x % 32) * W, long(blockIdx.x / across) * warps + threadIdx.x / 32,
            long(gridDim.x / across) * warps};
}

// The coefficients of a thread's columns.
template <class S, int W> struct Columns {
    S mean[W], scale[W], bias[W];

    __device__ __forceinline__ Columns(int column, const S* w, const S* b, const S* means, const S* variance, double eps) {
#pragma unroll
        for (int k = 0; k < W; k++) {
            mean[k] = means[column + k];
            scale[k] = w[column + k] / sqrt(variance[column + k] + S(eps));
            bias[k] = b[column + k];
        }
    }
};

// partial (lanes, 2, C): the mean of each lane's rows, and the sum of squared distances from it.
template <class T, int W> __global__ void __launch_bounds__(256) statistics(Sum<T>* partial, const T* x, long R, int C) {
    typedef Sum<T> S;
    const Share mine = share<W>(C);
    if (mine.column >= C) return;
    S mean[W] = {}, squares[W] = {};
    S count = 0;
    for (long r = mine.lane; r < R; r += mine.lanes) {
        const auto some = load<T, W>(x + r * C + mine.column);
        const S part = S(1) / (count += 1);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S d = S(some.e[k]) - mean[k];
            mean[k] += d * part;
            squares[k] += d * (S(some.e[k]) - mean[k]);
        }
    }
    S* to = partial + mine.lane * 2 * C + mine.column;
#pragma unroll
    for (int k = 0; k < W; k++) to[k] = mean[k], to[C + k] = squares[k];
}

template <class S> __global__ void __launch_bounds__(256) join(S* mean, S* variance, const S* partial, long lanes, long R, int C) {
    GRID_STRIDE(c, C) {
        S m = 0, squares = 0, count = 0;
        for (long lane = 0; lane < lanes && lane < R; lane++) {
            const S own = S((R - lane + lanes - 1) / lanes), d = partial[lane * 2 * C + c] - m, part = own / (count + own);
            m += d * part;
            squares += partial[(lane * 2 + 1) * C + c] + d * d * count * part;
            count += own;
        }
        mean[c] = m;
        variance[c] = squares / S(R);
    }
}

template <class T, int W>
__global__ void __launch_bounds__(256) normalise(T* y, const T* x, const Sum<T>* w, const Sum<T>* b, const Sum<T>* mean,
                                                 const Sum<T>* variance, long R, int C, double eps, double low, double high, int curved) {
    typedef Sum<T> S;
    const Share mine = share<W>(C);
    if (mine.column >= C) return;
    const Columns<S, W> at(mine.column, w, b, mean, variance, eps);
    for (long r = mine.lane; r < R; r += mine.lanes) {
        auto some = load<T, W>(x + r * C + mine.column);
#pragma unroll
        for (int k = 0; k < W; k++)
            some.e[k] = T(activated((S(some.e[k]) - at.mean[k]) * at.scale[k] + at.bias[k], S(low), S(high), bool(curved)));
        store<T, W>(y + r * C + mine.column, some);
    }
}

// partial (lanes, 2, C): each lane's sums of dz·(x - mean) and of dz.
template <class T, int W>
__global__ void __launch_bounds__(256) sums(Sum<T>* partial, const T* dy, const T* x, const Sum<T>* w, const Sum<T>* b,
                                            const Sum<T>* mean, const Sum<T>* variance, long R, int C, double eps, double low, double high,
                                            int curved) {
    typedef Sum<T> S;
    const Share mine = share<W>(C);
    if (mine.column >= C) return;
    const Columns<S, W> at(mine.column, w, b, mean, variance, eps);
    S products[W] = {}, total[W] = {};
    for (long r = mine.lane; r < R; r += mine.lanes) {
        const auto some = load<T, W>(x + r * C + mine.column), arrived = load<T, W>(dy + r * C + mine.column);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S centred = S(some.e[k]) - at.mean[k];
            const S dz = S(arrived.e[k]) * slope(centred * at.scale[k] + at.bias[k], S(low), S(high), bool(curved));
            products[k] += dz * centred;
            total[k] += dz;
        }
    }
    S* to = partial + mine.lane * 2 * C + mine.column;
#pragma unroll
    for (int k = 0; k < W; k++) to[k] = products[k], to[C + k] = total[k];
}

// dw, db (C,), either may be null; means (2, C): what `batchnorm_backward` subtracts per x - mean, and as it is. R: 0 if the statistics
// are given, and nothing is subtracted.
template <class S>
__global__ void __launch_bounds__(256) join_sums(S* dw, S* db, S* means, const S* partial, const S* variance, long lanes, long R, int C,
                                                 double eps) {
    GRID_STRIDE(c, C) {
        S products = 0, total = 0;
        for (long lane = 0; lane < lanes; lane++) {
            products += partial[lane * 2 * C + c];
            total += partial[(lane * 2 + 1) * C + c];
        }
        const S r = S(1) / sqrt(variance[c] + S(eps)), part = R ? S(1) / S(R) : S(0);
        if (dw) dw[c] = products * r;
        if (db) db[c] = total;
        means[c] = products * r * r * part;
        means[C + c] = total * part;
    }
}

template <class T, int W>
__global__ void __launch_bounds__(256) batchnorm_backward(T* dx, const T* dy, const T* x, const Sum<T>* w, const Sum<T>* b,
                                                          const Sum<T>* mean, const Sum<T>* variance, const Sum<T>* means, long R, int C,
                                                          double eps, double low, double high, int curved) {
    typedef Sum<T> S;
    const Share mine = share<W>(C);
    if (mine.column >= C) return;
    const Columns<S, W> at(mine.column, w, b, mean, variance, eps);
    for (long r = mine.lane; r < R; r += mine.lanes) {
        const auto arrived = load<T, W>(dy + r * C + mine.column);
        auto some = load<T, W>(x + r * C + mine.column);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const S centred = S(some.e[k]) - at.mean[k];
            const S dz = S(arrived.e[k]) * slope(centred * at.scale[k] + at.bias[k], S(low), S(high), bool(curved));
            some.e[k] = T(at.scale[k] * (dz - means[C + mine.column + k] - centred * means[mine.column + k]));
        }
        store<T, W>(dx + r * C + mine.column, some);
    }
}

// The new running statistics may be the same arrays as the old ones.
template <class S>
__global__ void __launch_bounds__(256) follow(S* new_mean, S* new_var, const S* running_mean, const S* running_var, const S* mean,
                                              const S* variance, int C, double momentum, double unbiased) {
    GRID_STRIDE(c, C) {
        new_mean[c] = running_mean[c] + S(momentum) * (mean[c] - running_mean[c]);
        new_var[c] = running_var[c] + S(momentum) * (variance[c] * S(unbiased) - running_var[c]);
    }
}

// new_weight (C, K) = weight with each row scaled; new_bias (C,), where bias may be null.
template <class S>
__global__ void __launch_bounds__(256) fold_weight(S* new_weight, const S* weight, const S* w, const S* variance, int C, int K, double eps) {
    GRID_STRIDE(n, long(C) * K) {
        const int c = int(n / K);
        new_weight[n] = weight[n] * (w[c] / sqrt(variance[c] + S(eps)));
    }
}

template <class S>
__global__ void __launch_bounds__(256) fold_bias(S* new_bias, const S* bias, const S* w, const S* b, const S* mean, const S* variance,
                                                 int C, double eps) {
    GRID_STRIDE(c, C) {
        const S scale = w[c] * (S(1) / sqrt(variance[c] + S(eps)));  // a quotient would spill registers
        new_bias[c] = ((bias ? bias[c] : S(0)) - mean[c]) * scale + b[c];
    }
}
