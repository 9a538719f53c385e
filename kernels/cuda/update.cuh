// Shared by the kernels of optimizers: the indices into `scalars` (begin_update.py), gradient clipping, the running average of weights.
// N, H: types of squares and scalars.
#pragma once
#include <common.cuh>

enum { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM, STEP, MOMENTUM, EMA_DECAY, SCALARS };

// The factor by which gradients are multiplied, in every thread.
template <class N, class H> __device__ __forceinline__ double clipping(const N* squares, int parts, const H* scalars) {
    __shared__ double shares[32];
    if (scalars[CLIP_NORM] <= 0) return 1;
    double total = 0;
    for (int i = threadIdx.x; i < parts; i += blockDim.x) total += double(squares[i]);
    return min(1.0, double(scalars[CLIP_NORM]) / (sqrt(block_sum(total, shares)) + 1e-6));
}

template <class H> __device__ __forceinline__ double average_decay(const H* scalars) {
    const double t = double(scalars[STEP]);
    return min(double(scalars[EMA_DECAY]), (1 + t) / (10 + t));
}

// new_average = decay * average + rest * parameters at vector i; does nothing if average is null.
template <class T, int W>
__device__ __forceinline__ void take_average(T* new_average, const T* average, const Vector<T, W>& parameters, long i, T decay, T rest) {
    if (!average) return;
    auto some = load<T, W>(average + i * W);
#pragma unroll
    for (int k = 0; k < W; k++) some.e[k] = decay * some.e[k] + rest * parameters.e[k];
    store<T, W>(new_average + i * W, some);
}
