// SGD with momentum over one flat buffer; the formulas are in sgd.py. Outputs may be the same arrays as the corresponding inputs.
#include <update.cuh>

template <class T, class N, class H, int W>
__global__ void __launch_bounds__(256) sgd(T* new_p, T* new_velocity, T* new_average, const T* p, const T* g, const T* velocity,
                                           const T* average, const N* squares, int parts, const H* scalars, long decayed, int nesterov,
                                           double scale, long size) {
    const T clip = T(clipping(squares, parts, scalars)), rate = T(scale * double(scalars[LR])), momentum = T(scalars[MOMENTUM]), decay = T(scalars[WEIGHT_DECAY]);
    const T kept = T(average_decay(scalars)), rest = T(1 - average_decay(scalars));
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
