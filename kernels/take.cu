// Rows by number: the formulas are in take.py.
#include <common.cuh>

template <class T, int W> __global__ void __launch_bounds__(256) take(T* y, const T* x, const long* index, long A, long R, long C, long P) {
    const long vectors = C / W;
    GRID_STRIDE(v, A * P * vectors) {
        const long row = v / vectors, at = v % vectors * W;
        store<T, W>(y + row * C + at, load<T, W>(x + (row / P * R + index[row % P]) * C + at));
    }
}

// A thread owns column c of one of the parts of the rows.
template <class S, class T>
__global__ void __launch_bounds__(256) take_backward(S* dx, const T* dy, const long* index, long A, long R, long C, long P, long parts) {
    GRID_STRIDE(v, A * parts * C) {
        const long c = v % C, part = v / C % parts, a = v / C / parts, first = part * R / parts, last = (part + 1) * R / parts;
        S* to = dx + a * R * C + c;
        const T* from = dy + a * P * C + c;
        for (long r = first; r < last; r++) to[r * C] = 0;
        for (long i = 0; i < P; i++) {
            const long r = index[i];
            if (first <= r && r < last) to[r * C] += S(from[i * C]);
        }
    }
}
