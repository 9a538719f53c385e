// The optimizer over one flat buffer: adamw.py has the formulas, and says where a number lies in `hyper`. Outputs may be the inputs of
// their kind. N, H: types of squares and hyper.
#include <common.cuh>

enum { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM, STEP, MOMENTUM, EMA_DECAY, HYPER };

// Block k: squares[k] = the sum of squares of the k-th stretch.
template <class T, class N, class H, int W>
__global__ void __launch_bounds__(512) begin_update(N* squares, H* new_hyper, const T* g, const H* hyper, long stretch, long size) {
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
    if (blockIdx.x == 0 && threadIdx.x < HYPER) new_hyper[threadIdx.x] = hyper[threadIdx.x] + (threadIdx.x == STEP ? H(1) : H(0));
}

// By what gradients are multiplied, in every thread.
template <class N, class H> __device__ __forceinline__ double clipping(const N* squares, int parts, const H* hyper) {
    __shared__ double shares[32];
    if (hyper[CLIP_NORM] <= 0) return 1;
    double total = 0;
    for (int i = threadIdx.x; i < parts; i += blockDim.x) total += double(squares[i]);
    return min(1.0, double(hyper[CLIP_NORM]) / (sqrt(block_sum(total, shares)) + 1e-6));
}

template <class H> __device__ __forceinline__ double average_decay(const H* hyper) {
    const double t = double(hyper[STEP]);
    return min(double(hyper[EMA_DECAY]), (1 + t) / (10 + t));
}

// new_average = decay * average + rest * parameters at vector i; neither is there where average is null.
template <class T, int W>
__device__ __forceinline__ void take_average(T* new_average, const T* average, const Vector<T, W>& parameters, long i, T decay, T rest) {
    if (!average) return;
    auto some = load<T, W>(average + i * W);
#pragma unroll
    for (int k = 0; k < W; k++) some.e[k] = decay * some.e[k] + rest * parameters.e[k];
    store<T, W>(new_average + i * W, some);
}

template <class T, class N, class H, int W>
__global__ void __launch_bounds__(256) adamw(T* new_p, T* new_m, T* new_v, T* new_average, const T* p, const T* g, const T* m, const T* v,
                                             const T* average, const N* squares, int parts, const H* hyper, long decayed, long size) {
    __shared__ T shared[7];                                             // what needs double precision, and a power, once a block
    const T clip = T(clipping(squares, parts, hyper));
    if (threadIdx.x == 0) {
        const double first = 1 - pow(double(hyper[BETA1]), double(hyper[STEP])), second = 1 - pow(double(hyper[BETA2]), double(hyper[STEP]));
        shared[0] = T(double(hyper[LR]) / first);
        shared[1] = T(1 / sqrt(second));
        shared[2] = T(1 - double(hyper[LR]) * double(hyper[WEIGHT_DECAY]));
        shared[3] = T(1 - double(hyper[BETA1]));
        shared[4] = T(1 - double(hyper[BETA2]));
        shared[5] = T(average_decay(hyper));
        shared[6] = T(1 - average_decay(hyper));
    }
    __syncthreads();
    const T rate = shared[0], root = shared[1], rest1 = shared[3], rest2 = shared[4];
    const T beta1 = T(hyper[BETA1]), beta2 = T(hyper[BETA2]), eps = T(hyper[EPS]);
    GRID_STRIDE(i, size / W) {
        auto parameters = load<T, W>(p + i * W), first = load<T, W>(m + i * W), second = load<T, W>(v + i * W);
        const auto gradients = load<T, W>(g + i * W);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const T d = gradients.e[k] * clip, kept = i * W + k < decayed ? shared[2] : T(1);
            first.e[k] = beta1 * first.e[k] + rest1 * d;
            second.e[k] = beta2 * second.e[k] + rest2 * d * d;
            parameters.e[k] = kept * parameters.e[k] - rate * first.e[k] / (sqrt(second.e[k]) * root + eps);
        }
        store<T, W>(new_m + i * W, first);
        store<T, W>(new_v + i * W, second);
        store<T, W>(new_p + i * W, parameters);
        take_average<T, W>(new_average, average, parameters, i, shared[5], shared[6]);
    }
}

template <class T, class N, class H, int W>
__global__ void __launch_bounds__(256) sgd(T* new_p, T* new_velocity, T* new_average, const T* p, const T* g, const T* velocity,
                                           const T* average, const N* squares, int parts, const H* hyper, long decayed, int nesterov,
                                           long size) {
    const T clip = T(clipping(squares, parts, hyper)), rate = T(hyper[LR]), momentum = T(hyper[MOMENTUM]), decay = T(hyper[WEIGHT_DECAY]);
    const T kept = T(average_decay(hyper)), rest = T(1 - average_decay(hyper));
    GRID_STRIDE(i, size / W) {
        auto parameters = load<T, W>(p + i * W), speeds = load<T, W>(velocity + i * W);
        const auto gradients = load<T, W>(g + i * W);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const T d = gradients.e[k] * clip + (i * W + k < decayed ? decay : T(0)) * parameters.e[k];
            speeds.e[k] = momentum * speeds.e[k] + d;
            parameters.e[k] -= rate * (nesterov ? momentum * speeds.e[k] + d : speeds.e[k]);
        }
        store<T, W>(new_velocity + i * W, speeds);
        store<T, W>(new_p + i * W, parameters);
        take_average<T, W>(new_average, average, parameters, i, kept, rest);
    }
}
