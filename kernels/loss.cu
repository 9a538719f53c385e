// Softmax cross-entropy; the formulas are in loss.py. One warp per row of K classes.
#include <common.cuh>

// losses, lse (B,), logits (B, K); targets (B, K) if SOFT, otherwise classes (B,).
template <class T, bool SOFT>
__global__ void __launch_bounds__(128) cross_entropy(Sum<T>* losses, Sum<T>* lse, const T* logits, const long* classes, const T* targets,
                                                     long B, int K, double smoothing) {
    typedef Sum<T> S;
    const S rest = S(1 - smoothing), everywhere = S(smoothing / K);
    const int lane = threadIdx.x % 32;
    for (long i = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < B; i += long(gridDim.x) * (blockDim.x / 32)) {
        const T* row = logits + i * K;
        S largest = S(row[0]), total = 0, all = 0, weighted = 0, weight = 0;
        for (int k = lane; k < K; k += 32) largest = larger(largest, S(row[k]));
        largest = warp_max(largest);
        for (int k = lane; k < K; k += 32) {
            const S x = S(row[k]) - largest;
            total += exp(x);
            all += x;
            if (SOFT) {
                const S t = S(targets[i * K + k]);
                weight += t;
                weighted += t * x;
            }
        }
        total = log(warp_sum(total));
        all = warp_sum(all);
        if (SOFT) {
            weight = warp_sum(weight);
            weighted = warp_sum(weighted);
        } else {
            const long known = classes[i];
            weight = 1;
            weighted = known >= 0 && known < K ? S(row[known]) - largest : S(nan(""));
        }
        if (lane == 0) {
            lse[i] = largest + total;
            losses[i] = (rest * weight + everywhere * K) * total - rest * weighted - everywhere * all;
        }
    }
}

// One block: loss = the mean of losses (B,).
template <class S> __global__ void __launch_bounds__(256) mean_loss(S* loss, const S* losses, long B) {
    __shared__ double shares[32];
    double total = 0;
    for (long i = threadIdx.x; i < B; i += 256) total += losses[i];
    total = block_sum(total, shares);
    if (threadIdx.x == 0) *loss = S(total / B);
}

template <class T, bool SOFT>
__global__ void __launch_bounds__(128, 1) cross_entropy_backward(T* dlogits, const Sum<T>* dloss, const T* logits, const long* classes,
                                                              const T* targets, const Sum<T>* lse, long B, int K, double smoothing) {
    typedef Sum<T> S;
    const S rest = S(1 - smoothing), everywhere = S(smoothing / K), mean = *dloss / S(B);
    const int lane = threadIdx.x % 32;
    for (long i = (long(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < B; i += long(gridDim.x) * (blockDim.x / 32)) {
        S weight = 1;
        if (SOFT) {
            weight = 0;
            for (int k = lane; k < K; k += 32) weight += S(targets[i * K + k]);
            weight = warp_sum(weight);
        }
        weight = (rest * weight + everywhere * K) * mean;
        const long known = SOFT ? 0 : classes[i];
        const bool wrong = known < 0 || known >= K;
        for (int k = lane; k < K; k += 32) {
            const S target = SOFT ? S(targets[i * K + k]) : k == known ? S(1) : S(0);
            const S d = weight * exp(S(logits[i * K + k]) - lse[i]) - mean * (everywhere + rest * target);
            dlogits[i * K + k] = T(wrong ? S(nan("")) : d);
        }
    }
}
