// The beginning of an optimizer step; the formulas are in begin_update.py. N, H: types of squares and scalars.
#include <update.cuh>

// Block k: squares[k] = the sum of squares over the k-th stretch of gradients.
template <class T, class N, class H, int W>
__global__ void __launch_bounds__(512) begin_update(N* squares, H* new_scalars, const T* g, const H* scalars, long stretch, long size) {
    __shared__ double shares[32];
    const long start = blockIdx.x * stretch, stop = min(start + stretch, size);
    double total = 0;
#pragma unroll 4
    for (long i = start / W + threadIdx.x; i < stop / W; i += blockDim.x) {
        const auto some = load<T, W>(g + i * W);
        double few = 0;
#pragma unroll
        for (int k = 0; k < W; k++) few += double(some.e[k]) * double(some.e[k]);
        total += few;
    }
    total = block_sum(total, shares);
    if (threadIdx.x == 0) squares[blockIdx.x] = N(total);
    if (blockIdx.x == 0 && threadIdx.x < SCALARS) new_scalars[threadIdx.x] = scalars[threadIdx.x] + (threadIdx.x == STEP ? H(1) : H(0));
}
