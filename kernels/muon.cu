// Muon's momentum and its step; the formulas are in muon.py. Outputs may be the same arrays as the corresponding inputs. U: type of the
// matrices, which have `size` elements each, `total` in all, and begin at `starts` in the flat buffers.
#include <update.cuh>

template <class T, class U, class N, class H>
__global__ void __launch_bounds__(256) muon_momentum(T* new_m, U* u, const T* g, const T* m, const long* starts, const N* squares, int parts,
                                                     const H* scalars, long total, long size, int nesterov) {
    const T clip = T(clipping(squares, parts, scalars)), momentum = T(scalars[MOMENTUM]), rest = T(1 - double(scalars[MOMENTUM]));
    GRID_STRIDE(i, total) {
        const long at = starts[i / size] + i % size;
        const T d = g[at] * clip, a = momentum * m[at] + rest * d;
        new_m[at] = a;
        u[i] = U(nesterov ? momentum * a + rest * d : a);
    }
}

template <class T, class U, class H>
__global__ void __launch_bounds__(256) muon(T* new_p, T* new_average, const T* p, const U* o, const T* average, const long* starts,
                                            const H* scales, const H* scalars, long total, long size, double ratio) {
    const T decay = T(average_decay(scalars)), rest = T(1 - average_decay(scalars));
    const T shrinkage = T(double(scalars[LR]) * double(scalars[WEIGHT_DECAY])), rate = T(double(scalars[LR]) * ratio);
    GRID_STRIDE(i, total) {
        const long matrix = i / size, at = starts[matrix] + i - matrix * size;
        const T scale = T(scales[matrix]), moved = p[at] - scale * (shrinkage * p[at] + rate * T(o[i]));
        new_p[at] = moved;
        if (average) new_average[at] = decay * average[at] + rest * moved;
    }
}
