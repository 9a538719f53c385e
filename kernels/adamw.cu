// AdamW over one flat buffer; the formulas are in adamw.py. Outputs may be the same arrays as the corresponding inputs.
#include <update.cuh>

template <class T, class N, class H, int W>
__global__ void __launch_bounds__(256) adamw(T* new_p, T* new_m, T* new_v, T* new_average, const T* p, const T* g, const T* m, const T* v,
                                             const T* average, const N* squares, int parts, const H* scalars, long decayed, double scale,
                                             long size) {
    __shared__ T shared[7];                                             // coefficients, computed in double precision once per block
    const T clip = T(clipping(squares, parts, scalars));
    if (threadIdx.x == 0) {
        const double lr = scale * double(scalars[LR]);
        const double first = 1 - pow(double(scalars[BETA1]), double(scalars[STEP])), second = 1 - pow(double(scalars[BETA2]), double(scalars[STEP]));
        shared[0] = T(lr / first);
        shared[1] = T(1 / sqrt(second));
        shared[2] = T(1 - lr * double(scalars[WEIGHT_DECAY]));
        shared[3] = T(1 - double(scalars[BETA1]));
        shared[4] = T(1 - double(scalars[BETA2]));
        shared[5] = T(average_decay(scalars));
        shared[6] = T(1 - average_decay(scalars));
    }
    __syncthreads();
    const T rate = shared[0], root = shared[1], rest1 = shared[3], rest2 = shared[4];
    const T beta1 = T(scalars[BETA1]), beta2 = T(scalars[BETA2]), eps = T(scalars[EPS]);
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
