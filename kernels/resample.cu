// A sparse linear map along one axis, in the CSR format of resample.py. A thread computes W adjacent elements along C.
#include <common.cuh>

// y (A, M, C), x (A, N, C); row i of the map has the weights [starts[i], starts[i + 1]), for the tokens in `indices`.
template <class T, int W>
__global__ void __launch_bounds__(256) resample(T* y, const T* x, const long* starts, const long* indices, const Sum<T>* weights, long vectors,
                                                int N, int M, int C) {
    const int across = C / W;
    GRID_STRIDE(v, vectors) {
        const int c = v % across * W, i = v / across % M;
        const T* from = x + v / across / M * N * C + c;
        Sum<T> totals[W] = {};
        for (long tap = starts[i]; tap < starts[i + 1]; tap++) {
            const auto some = load<T, W>(from + indices[tap] * C);
            const Sum<T> weight = weights[tap];
#pragma unroll
            for (int k = 0; k < W; k++) totals[k] += weight * Sum<T>(some.e[k]);
        }
        Vector<T, W> out;
#pragma unroll
        for (int k = 0; k < W; k++) out.e[k] = T(totals[k]);
        store<T, W>(y + v * W, out);
    }
}
