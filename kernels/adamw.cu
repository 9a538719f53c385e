// The optimizer over one flat buffer: adamw.py has the formulas, and says where a number lies in `hyper`. Outputs may be the inputs of
// their kind. N, H: types of norm and hyper.
#include <common.cuh>

enum { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM, STEP, MOMENTUM, EMA_DECAY };

template <class N, class H> __device__ __forceinline__ double clipping(const N* norm, const H* hyper) {
    return hyper[CLIP_NORM] > 0 ? min(1.0, double(hyper[CLIP_NORM]) / (double(*norm) + 1e-6)) : 1.0;
}

template <class T, class N, class H, int W>
__global__ void __launch_bounds__(256) adamw(T* new_p, T* new_m, T* new_v, const T* p, const T* g, const T* m, const T* v, const N* norm,
                                             const H* hyper, long decayed, long size) {
    __shared__ T shared[8];                                             // what needs double precision, and a power, once a block
    if (threadIdx.x == 0) {
        const double first = 1 - pow(double(hyper[BETA1]), double(hyper[STEP])), second = 1 - pow(double(hyper[BETA2]), double(hyper[STEP]));
        shared[0] = T(clipping(norm, hyper));
        shared[1] = T(double(hyper[LR]) / first);
        shared[2] = T(1 / sqrt(second));
        shared[3] = T(1 - double(hyper[LR]) * double(hyper[WEIGHT_DECAY]));
        shared[4] = T(1 - double(hyper[BETA1]));
        shared[5] = T(1 - double(hyper[BETA2]));
    }
    __syncthreads();
    const T clip = shared[0], rate = shared[1], root = shared[2], rest1 = shared[4], rest2 = shared[5];
    const T beta1 = T(hyper[BETA1]), beta2 = T(hyper[BETA2]), eps = T(hyper[EPS]);
    GRID_STRIDE(i, size / W) {
        auto parameters = load<T, W>(p + i * W), first = load<T, W>(m + i * W), second = load<T, W>(v + i * W);
        const auto gradients = load<T, W>(g + i * W);
#pragma unroll
        for (int k = 0; k < W; k++) {
            const T d = gradients.e[k] * clip, kept = i * W + k < decayed ? shared[3] : T(1);
            first.e[k] = beta1 * first.e[k] + rest1 * d;
            second.e[k] = beta2 * second.e[k] + rest2 * d * d;
            parameters.e[k] = kept * parameters.e[k] - rate * first.e[k] / (sqrt(second.e[k]) * root + eps);
        }
        store<T, W>(new_m + i * W, first);
        store<T, W>(new_v + i * W, second);
        store<T, W>(new_p + i * W, parameters);
    }
}

template <class T, class N, class H, int W>
__global__ void __launch_bounds__(256) sgd(T* new_p, T* new_velocity, const T* p, const T* g, const T* velocity, const N* norm,
                                           const H* hyper, long decayed, int nesterov, long size) {
    const T clip = T(clipping(norm, hyper)), rate = T(hyper[LR]), momentum = T(hyper[MOMENTUM]), decay = T(hyper[WEIGHT_DECAY]);
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
    }
}

template <class T, class H, int W>
__global__ void __launch_bounds__(256) ema(T* new_average, const T* average, const T* p, const H* hyper, long size) {
    const T decay = T(hyper[EMA_DECAY]), rest = T(1 - double(hyper[EMA_DECAY]));
    GRID_STRIDE(i, size / W) {
        auto some = load<T, W>(average + i * W);
        const auto now = load<T, W>(p + i * W);
#pragma unroll
        for (int k = 0; k < W; k++) some.e[k] = decay * some.e[k] + rest * now.e[k];
        store<T, W>(new_average + i * W, some);
    }
}

// partial[block] = the block's share of the sum of squares.
template <class T, int W> __global__ void __launch_bounds__(256) squares(double* partial, const T* g, long size) {
    __shared__ double shares[32];
    double total = 0;
    GRID_STRIDE(i, size / W) {
        const auto some = load<T, W>(g + i * W);
        double few = 0;
#pragma unroll
        for (int k = 0; k < W; k++) few += double(some.e[k]) * double(some.e[k]);
        total += few;
    }
    total = block_sum(total, shares);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// One block.
__global__ void __launch_bounds__(256) root(double* norm, const double* partial, int parts) {
    __shared__ double shares[32];
    double total = 0;
    for (int i = threadIdx.x; i < parts; i += 256) total += partial[i];
    total = block_sum(total, shares);
    if (threadIdx.x == 0) *norm = sqrt(total);
}

__global__ void advance(double* hyper) { hyper[STEP] += 1; }
