// Patches of images as rows, and the adjoint; the formulas are in unfold.py.
#include <common.cuh>

// The images have `channel` elements from one channel to the next, and `step` from one column to the next; rows are width·step apart.
// A thread copies W adjacent elements of a line of a patch.
template <class T, int W>
__global__ void __launch_bounds__(256) unfold(T* y, const T* x, int B, int C, int H, int width, int channel, int step, int U, int V, int kh,
                                              int kw, int sh, int sw, int ph, int pw) {
    const int across = kw / W;                                          // vectors per line
    GRID_STRIDE(i, long(B) * U * V * C * kh * across) {
        long rest = i / across;
        const int j = i % across * W, line = rest % (C * kh);
        rest /= C * kh;
        const int v = rest % V, u = rest / V % U, b = rest / V / U;
        const int c = line / kh, h = u * sh + line % kh - ph, first = v * sw + j - pw;
        const T* row = x + long(b) * C * H * width + long(c) * channel + long(h) * width * step;
        Vector<T, W> some;
#pragma unroll
        for (int k = 0; k < W; k++) {
            const int w = first + k;
            some.e[k] = h >= 0 && h < H && w >= 0 && w < width ? row[w * step] : T(0);
        }
        store<T, W>(y + i * W, some);
    }
}

// A thread sums the gradient of one pixel over the patches that contain it, in a fixed order.
template <class T>
__global__ void __launch_bounds__(256) fold(T* dx, const T* dy, int B, int C, int H, int width, int channel, int step, int U, int V, int kh,
                                            int kw, int sh, int sw, int ph, int pw) {
    GRID_STRIDE(i, long(B) * C * H * width) {
        const int w = i % width, h = i / width % H, c = i / width / H % C, b = i / width / H / C;
        Sum<T> total = 0;
        for (int line = (h + ph) % sh; line < kh && line <= h + ph; line += sh) {
            const int u = (h + ph - line) / sh;
            if (u >= U) continue;
            for (int column = (w + pw) % sw; column < kw && column <= w + pw; column += sw) {
                const int v = (w + pw - column) / sw;
                if (v < V) total += Sum<T>(dy[(((long(b) * U + u) * V + v) * C + c) * kh * kw + line * kw + column]);
            }
        }
        dx[long(b) * C * H * width + long(c) * channel + (long(h) * width + w) * step] = T(total);
    }
}
