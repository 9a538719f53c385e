// The gradient of a slice along one axis: see slice.py.
#include <common.cuh>

// dx (size / row, row) = dy (size / row, length) from element `first` of each row on, 0 elsewhere.
template <class T, int W>
__global__ void __launch_bounds__(256) slice_backward(T* dx, const T* dy, long size, long row, long first, long length) {
    GRID_STRIDE(v, size / W) {
        const long a = v * W / row, at = v * W - a * row - first;
        Vector<T, W> out;
#pragma unroll
        for (int k = 0; k < W; k++) out.e[k] = T(0);
        if (at >= 0 && at < length) out = load<T, W>(dy + a * length + at);
        store<T, W>(dx + v * W, out);
    }
}
