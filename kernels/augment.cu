// Training images from stored images; the formulas are in augment.py. A thread computes all channels of one pixel.
#include <common.cuh>

template <class S> struct Axis {                                        // the two pixels around a position, and their weights
    int low, high;
    S w_low, w_high;
};

template <class S> __device__ __forceinline__ Axis<S> axis(S place, int size) {
    if (!(place > -1 && place < size)) return {0, 0, S(0), S(0)};       // also NaN
    const int below = int(floor(place));
    const S part = place - floor(place);
    return {below > 0 ? below : 0, below + 1 < size ? below + 1 : size - 1, below >= 0 ? 1 - part : S(0), below + 1 < size ? part : S(0)};
}

__device__ __forceinline__ bool within(const long* box, int i, int j) { return i >= box[0] && i < box[2] && j >= box[1] && j < box[3]; }

// y (B, C, H, width), images (n, H, width, C), matrices (B, 2, 3), colours (B, C, C + 1), boxes and holes (B, 4).
template <class T, class I>
__global__ void __launch_bounds__(256) augment(T* y, const I* images, const long* index, const long* partner, const Sum<T>* matrices,
                                               const Sum<T>* colours, const Sum<T>* lam, const long* boxes, const long* holes,
                                               const Sum<T>* mean, const Sum<T>* std, int B, int C, int H, int width, double unit) {
    typedef Sum<T> S;
    GRID_STRIDE(pixel, long(B) * H * width) {
        const int j = pixel % width, i = pixel / width % H, b = pixel / width / H;
        const bool blank = within(holes + b * 4, i, j);
        const S own = within(boxes + b * 4, i, j) ? S(0) : lam[b];
        Axis<S> across[2], down[2];
        const I* from[2];
#pragma unroll
        for (int turn = 0; turn < 2; turn++) {
            const long s = turn ? partner[b] : b;
            const S* m = matrices + s * 6;
            across[turn] = axis(m[0] * j + m[1] * i + m[2], width);
            down[turn] = axis(m[3] * j + m[4] * i + m[5], H);
            from[turn] = images + index[s] * H * width * C;
        }
        for (int c = 0; c < C; c++) {
            S total = 0;
#pragma unroll
            for (int turn = 0; turn < 2; turn++) {
                const S share = turn ? 1 - own : own;
                if (share == 0) continue;
                const Axis<S> u = across[turn], v = down[turn];
                const S* mixed = colours + ((turn ? partner[b] : b) * C + c) * (C + 1);
                S value = mixed[C];
                for (int d = 0; d < C; d++) {
                    const I *top = from[turn] + long(v.low) * width * C + d, *bottom = from[turn] + long(v.high) * width * C + d;
                    const S above = u.w_low * S(top[u.low * C]) + u.w_high * S(top[u.high * C]);
                    const S below = u.w_low * S(bottom[u.low * C]) + u.w_high * S(bottom[u.high * C]);
                    value += mixed[d] * (v.w_low * above + v.w_high * below) * S(unit);
                }
                total += share * value;
            }
            y[((long(b) * C + c) * H + i) * width + j] = T(blank ? S(0) : (total - mean[c]) / std[c]);
        }
    }
}
