// Attention of one query per sample; the formulas are in cross_attention.py. One warp per head of a sample.
#include <common.cuh>

// y, q (B, H, D), p (B, H, N), k, v (B, N, H, D).
template <class T>
__global__ void __launch_bounds__(256) cross_attention_forward(T* y, Sum<T>* p, const T* q, const T* k, const T* v, int B, int N, int H,
                                                               int D, double scale) {
    typedef Sum<T> S;
    const int warps = gridDim.x * (blockDim.x / 32), lane = threadIdx.x % 32;
    const long row = long(H) * D;
    for (int head = (blockIdx.x * blockDim.x + threadIdx.x) / 32; head < B * H; head += warps) {
        const T* query = q + long(head) * D;
        const long start = long(head / H) * N * row + long(head % H) * D;
        S* mine = p + long(head) * N;
        S top = -INFINITY, total = 0;
        for (int n = lane; n < N; n += 32) {
            S logit = 0;
            for (int d = 0; d < D; d++) logit += S(query[d]) * S(k[start + n * row + d]);
            mine[n] = logit * S(scale);
            top = larger(top, mine[n]);
        }
        top = warp_max(top);
        for (int n = lane; n < N; n += 32) {
            mine[n] = exp(mine[n] - top);
            total += mine[n];
        }
        const S inverse = S(1) / warp_sum(total);
        for (int n = lane; n < N; n += 32) mine[n] *= inverse;
        __syncwarp();
        for (int d = lane; d < D; d += 32) {
            S sum = 0;
            for (int n = 0; n < N; n++) sum += mine[n] * S(v[start + n * row + d]);
            y[long(head) * D + d] = T(sum);
        }
    }
}

// dl (B, H, N): scratch memory. A gradient that is null is not written.
template <class T>
__global__ void __launch_bounds__(256) cross_attention_backward(T* dq, T* dk, T* dv, Sum<T>* dl, const T* dy, const T* q, const T* k,
                                                                const T* v, const Sum<T>* p, int B, int N, int H, int D, double scale) {
    typedef Sum<T> S;
    const int warps = gridDim.x * (blockDim.x / 32), lane = threadIdx.x % 32;
    const long row = long(H) * D;
    for (int head = (blockIdx.x * blockDim.x + threadIdx.x) / 32; head < B * H; head += warps) {
        const T *query = q + long(head) * D, *arrived = dy + long(head) * D;
        const long start = long(head / H) * N * row + long(head % H) * D;
        const S* mine = p + long(head) * N;
        S *gradient = dl + long(head) * N, mean = 0;
        for (int n = lane; n < N; n += 32) {
            S dp = 0;
            for (int d = 0; d < D; d++) dp += S(arrived[d]) * S(v[start + n * row + d]);
            gradient[n] = dp;
            mean += mine[n] * dp;
        }
        mean = warp_sum(mean);
        for (int n = lane; n < N; n += 32) gradient[n] = mine[n] * (gradient[n] - mean) * S(scale);
        __syncwarp();
        for (int d = lane; d < D; d += 32) {
            S sum = 0;
            for (int n = 0; n < N; n++) {
                sum += gradient[n] * S(k[start + n * row + d]);
                if (dk) dk[start + n * row + d] = T(gradient[n] * S(query[d]));
                if (dv) dv[start + n * row + d] = T(mine[n] * S(arrived[d]));
            }
            if (dq) dq[long(head) * D + d] = T(sum);
        }
    }
}
