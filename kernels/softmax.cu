// Softmax over the last axis; the formulas are in softmax.py.
#include <common.cuh>

// One warp per row of (R, C); repeated reads of the row hit the cache.
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
