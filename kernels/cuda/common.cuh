// Shared by all kernels: accumulator types, vectors of 16 bytes, reductions over a warp and over a block.
#pragma once
#include <ptx.cuh>

#ifndef INFINITY                                                        // not defined by NVRTC
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef unsigned int u32;
typedef unsigned long u64;

template <class T> struct SumOf { typedef float type; };
template <> struct SumOf<double> { typedef double type; };
template <class T> using Sum = typename SumOf<T>::type;                 // accumulator of T: float, but double for double

template <class T, int W> struct alignas(sizeof(T) * W) Vector {       // W elements, read or written by one instruction
    T e[W];
};
template <class T> constexpr int WIDTH = 16 / sizeof(T);               // elements of the widest vector

template <class T, int W> __device__ __forceinline__ Vector<T, W> load(const T* from) {
    return *reinterpret_cast<const Vector<T, W>*>(from);
}
template <class T, int W> __device__ __forceinline__ void store(T* to, const Vector<T, W>& value) {
    *reinterpret_cast<Vector<T, W>*>(to) = value;
}

// W accumulators as elements of T; bfloat16 in pairs, one instruction each.
template <class T, int W> __device__ __forceinline__ Vector<T, W> rounded(const Sum<T>* from) {
    Vector<T, W> to;
    if constexpr (sizeof(T) == 2 && W % 2 == 0) {
#pragma unroll
        for (int k = 0; k < W; k += 2) {
            const unsigned pair = pack(from[k], from[k + 1]);
            to.e[k].bits = (unsigned short)pair, to.e[k + 1].bits = (unsigned short)(pair >> 16);
        }
    } else {
#pragma unroll
        for (int k = 0; k < W; k++) to.e[k] = T(from[k]);
    }
    return to;
}

template <class S> __device__ __forceinline__ S larger(S a, S b) { return a > b ? a : b; }

template <class S> __device__ __forceinline__ S warp_sum(S value) {     // the sum over all 32 lanes, in every lane
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}
template <class S> __device__ __forceinline__ S warp_max(S value) {
    for (int step = 16; step > 0; step /= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
}
template <class S> __device__ __forceinline__ S block_sum(S value, S* shared) {        // the sum, in all threads; shared: 32 elements
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    value = warp_sum(value);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    value = warp_sum(lane < warps ? shared[lane] : S(0));
    __syncthreads();
    return value;
}

#define GRID_STRIDE(i, n) \
    for (long i = long(blockIdx.x) * blockDim.x + threadIdx.x; i < (n); i += long(gridDim.x) * blockDim.x)

// y = f(x) element by element, W at a time.
template <int W, class Y, class X, class F> __device__ __forceinline__ void map(Y* y, const X* x, long size, F f) {
    GRID_STRIDE(i, size / W) {
        const auto some = load<X, W>(x + i * W);
        Vector<Y, W> out;
#pragma unroll
        for (int k = 0; k < W; k++) out.e[k] = f(some.e[k]);
        store<Y, W>(y + i * W, out);
    }
}

template <class A, class B> struct WiderOf { typedef float type; };     // accumulator type for products of two element types
template <class B> struct WiderOf<double, B> { typedef double type; };
template <class A> struct WiderOf<A, double> { typedef double type; };
template <> struct WiderOf<double, double> { typedef double type; };
template <class A, class B> using Wider = typename WiderOf<A, B>::type;
